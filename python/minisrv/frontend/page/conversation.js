// A conversation is a tree of messages: an edit or another answer begins a branch. Pure functions.
//
// { id, title, updated, system, head, messages: { id: message } }
// message: { id, parent, role, content, at } and, of the assistant: reasoning, calls, stats, error,
// stopped, json; of a tool: callId.

export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation(system = "") {
  return { id: newId(), title: "New chat", updated: Date.now(), system, head: null, messages: {} };
}

/** Append a message below `parent`; the conversation then ends with it. */
export function add(conversation, parent, fields) {
  const message = { id: newId(), parent, at: Date.now(), content: "", ...fields };
  conversation.messages[message.id] = message;
  conversation.head = message.id;
  conversation.updated = message.at;
  if (fields.role === "user" && parent === null) conversation.title = titleOf(fields.content);
  return message;
}

function titleOf(content) {
  const line = content.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57)}...` : line || "New chat";
}

/** The messages from the first one to `id`. */
export function pathTo(conversation, id) {
  const path = [];
  for (let at = conversation.messages[id]; at; at = conversation.messages[at.parent]) path.push(at);
  return path.reverse();
}

export const currentPath = (conversation) => pathTo(conversation, conversation.head);

/** The messages that take the same place, oldest first. */
export function siblings(conversation, message) {
  return Object.values(conversation.messages).filter(
    (other) => other.parent === message.parent && (other.role === "user") === (message.role === "user"),
  );
}

/** Show the branch of `message`, to the end that was added last. */
export function showBranch(conversation, message) {
  let end = message;
  const children = (id) => Object.values(conversation.messages).filter((m) => m.parent === id);
  for (let below = children(end.id); below.length; below = children(end.id)) end = below.at(-1);
  conversation.head = end.id;
}

/** The calls of the last message that wait for a result. */
export function openCalls(conversation) {
  const last = conversation.messages[conversation.head];
  return last?.role === "assistant" && last.calls ? last.calls : [];
}

/** What the server gets: the path to `id` as messages of the chat API. */
export function apiMessages(conversation, id) {
  const sent = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const message of pathTo(conversation, id)) {
    if (message.role === "tool") {
      sent.push({ role: "tool", tool_call_id: message.callId, content: message.content });
    } else if (message.role === "user") {
      sent.push({ role: "user", content: message.content });
    } else if (message.content || message.calls?.length) {
      sent.push(answerOf(message));
    }
  }
  return sent;
}

function answerOf(message) {
  const answer = { role: "assistant", content: message.content || null };
  if (message.reasoning) answer.reasoning_content = message.reasoning;
  if (message.calls?.length) {
    answer.tool_calls = message.calls.map(({ id, name, args }) => {
      return { id, type: "function", function: { name, arguments: args } };
    });
  }
  return answer;
}

/** A conversation of a file, with nothing in it but what the page knows; null if it is none. */
export function readConversation(value) {
  if (typeof value !== "object" || value === null || typeof value.messages !== "object") return null;
  const text = (given) => (typeof given === "string" ? given : "");
  const read = newConversation(text(value.system));
  read.title = text(value.title) || read.title;
  read.updated = Number.isFinite(value.updated) ? value.updated : read.updated;
  for (const [id, given] of Object.entries(value.messages ?? {})) {
    const message = readMessage(id, given, text);
    if (message !== null) read.messages[id] = message;
  }
  for (const message of Object.values(read.messages)) {
    if (message.parent !== null && !read.messages[message.parent]) return null;
    if (isCircular(read, message)) return null;
  }
  read.head = read.messages[value.head] ? value.head : (Object.keys(read.messages).at(-1) ?? null);
  return read;
}

function isCircular(conversation, message) {
  const seen = new Set();
  for (let at = message; at; at = conversation.messages[at.parent]) {
    if (seen.has(at.id)) return true;
    seen.add(at.id);
  }
  return false;
}

function readMessage(id, given, text) {
  if (!["user", "assistant", "tool"].includes(given?.role)) return null;
  const message = {
    id,
    parent: typeof given.parent === "string" ? given.parent : null,
    role: given.role,
    content: text(given.content),
    at: Number(given.at) || 0,
  };
  if (given.role === "tool") message.callId = text(given.callId);
  if (given.role !== "assistant") return message;
  if (given.reasoning) message.reasoning = text(given.reasoning);
  if (given.error) message.error = text(given.error);
  if (given.stopped) message.stopped = true;
  if (given.json) message.json = true;
  if (given.requestId) message.requestId = text(given.requestId);
  if (Array.isArray(given.calls)) {
    message.calls = given.calls.map((c) => ({ id: text(c?.id), name: text(c?.name), args: text(c?.args) }));
  }
  const stats = Object.entries(given.stats ?? {}).filter(([, number]) => Number.isFinite(number));
  if (stats.length) message.stats = Object.fromEntries(stats);
  return message;
}
