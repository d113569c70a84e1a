// What the page asks of the server. Every failure is an ApiError whose message is a sentence.

const KEY = "minisrv.key";
const BROKEN = "The connection broke before the end of the answer.";

export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// The key lives as long as the tab.
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** A response with the status 200; relative, so that a prefix of a proxy stays. */
async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(sentence(response.status, body), response.status, body?.error?.code ?? null);
}

function sentence(status, body) {
  if (status === 401) {
    return key.get()
      ? "The server does not know this key. Enter another one."
      : "This server needs a key. Enter one to go on.";
  }
  const message = body?.error?.message ?? `The server answered with the status ${status}.`;
  return asSentence(message);
}

function asSentence(text) {
  const begun = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

export const getModels = async () => (await (await call("v1/models")).json()).data;
export const getLoad = async () => (await (await call("v1/loads")).json()).loads[0];

export async function getTree(requestId, withText) {
  const query = new URLSearchParams(requestId ? { request_id: requestId } : {});
  if (withText) query.set("text", "true");
  return (await call(`v1/cache/tree?${query}`)).json();
}

/** The body of /ready, which has a `status` whatever the state. */
export async function getReady() {
  try {
    return await (await fetch("ready", { cache: "no-store" })).json();
  } catch {
    return { status: "unreachable" };
  }
}

/** The chunks of a chat as they arrive. */
export async function* streamChat(body, requestId, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Request-Id": requestId },
    body: JSON.stringify(body),
    signal,
  });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(asSentence(chunk.error.message), 0, chunk.error.code);
    yield chunk;
  }
  if (!ended) throw new ApiError(BROKEN);
}

/** The data of server-sent events; their comments keep a silent connection open. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const parts = buffer.split("\n\n");
      buffer = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(BROKEN);
  } finally {
    reader.cancel().catch(() => {});
  }
}
