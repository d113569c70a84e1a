// The page: which conversation is shown, and what buttons and keys do.

import { getModels, getReady, key } from "./api.js";
import { generate } from "./answer.js";
import * as conversations from "./conversation.js";
import { announce, byId, el, iconButton } from "./dom.js";
import { EngineView, stateSentence } from "./engine_view.js";
import { MessageView, resultForm } from "./message_view.js";
import { changeSettings, DEFAULTS, openSettings, readSettings, settings } from "./settings.js";
import * as storage from "./storage.js";

const NARROW = matchMedia("(max-width: 1000px)");

let chats = [];
let chat = conversations.newConversation();
let views = new Map(); // of the messages that are shown, by id
const running = new Map(); // by id of the conversation: what ends its answer

const actions = { edit: editMessage, regenerate, branch: showBranch };
const engine = new EngineView(lastRequest, () => settings.treeText);

// --- The conversation that is shown

function lastRequest() {
  const answers = conversations.currentPath(chat).filter((message) => message.requestId);
  return answers.at(-1)?.requestId ?? "";
}

function showChat() {
  const path = conversations.currentPath(chat);
  const viewOf = (message) => {
    const known = views.get(message.id);
    return known?.fits(chat, message) ? known : new MessageView(chat, message, actions);
  };
  views = new Map(path.map((message) => [message.id, viewOf(message)]));
  byId("messages").replaceChildren(...[...views.values()].map((view) => view.element));
  byId("empty").hidden = path.length > 0;
  byId("title").textContent = chat.title;
  showComposer();
  showChats();
  toBottom();
}

function showComposer() {
  const busy = running.has(chat.id);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  document.querySelector(".results")?.remove();
  const calls = busy ? [] : conversations.openCalls(chat);
  if (calls.length) byId("messages").append(resultForm(calls, sendResults));
}

function showChats() {
  const items = chats.map((one) => {
    const open = el("button", { type: "button", class: "chat", text: one.title, title: one.title });
    if (one.id === chat.id) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => openChat(one));
    const remove = iconButton("trash", `Delete ${one.title}`, () => deleteChat(one), "quiet");
    return el("li", {}, open, remove);
  });
  byId("chats").replaceChildren(...items);
}

function openChat(one) {
  chat = one;
  showChat();
  showSidebar(false);
  byId("input").focus();
}

const newChat = () => openChat(conversations.newConversation());

async function deleteChat(one) {
  if (!confirm(`Delete the chat "${one.title}"?`)) return;
  running.get(one.id)?.abort();
  chats = chats.filter((other) => other !== one);
  await storage.deleteConversation(one.id);
  if (chat === one) newChat();
  else showChats();
}

/** Keep a conversation; it moves to the front of the list. */
async function keep(one) {
  if (!Object.keys(one.messages).length) return;
  chats = [one, ...chats.filter((other) => other !== one)];
  showChats();
  try {
    await storage.saveConversation(one);
  } catch (error) {
    showBanner(`This browser did not keep the chat: ${error.message}`);
  }
}

// --- Messages

function send(text) {
  conversations.add(chat, chat.head, { role: "user", content: text });
  return answer(chat);
}

function sendResults(results) {
  const calls = conversations.openCalls(chat);
  results.forEach((content, i) => {
    conversations.add(chat, chat.head, { role: "tool", content, callId: calls[i].id });
  });
  return answer(chat);
}

function editMessage(message, text) {
  running.get(chat.id)?.abort();
  conversations.add(chat, message.parent, { role: "user", content: text });
  return answer(chat);
}

function regenerate(message) {
  if (running.has(chat.id)) return;
  chat.head = message.parent;
  answer(chat);
}

function showBranch(message) {
  if (running.has(chat.id)) return;
  conversations.showBranch(chat, message);
  showChat();
  keep(chat);
}

/** Generate the next answer of `one`, which may not be the conversation that is shown later. */
async function answer(one) {
  const stop = new AbortController();
  running.set(one.id, stop);
  const json = Boolean(settings.schema.trim());
  const asked = one.head;
  const message = conversations.add(one, asked, { role: "assistant", requestId: conversations.newId() });
  if (json) message.json = true;
  keep(one);
  showChat();
  let saved = Date.now();
  const changed = (progress) => {
    if (one === chat) {
      const sticks = isAtBottom();
      views.get(message.id)?.update({ running: true, progress });
      if (sticks) toBottom();
    }
    if (Date.now() - saved < 2000) return;
    saved = Date.now();
    storage.saveConversation(one).catch(() => {});
  };
  await generate(one, asked, message, stop.signal, changed);
  if (running.get(one.id) === stop) running.delete(one.id);
  if (message.unauthorized) needKey(message.error);
  delete message.unauthorized;
  if (one === chat) {
    const sticks = isAtBottom();
    views.get(message.id)?.update({ running: false });
    showComposer();
    if (sticks) toBottom();
    announce(message.error ?? (message.stopped ? "Stopped." : "The answer is complete."));
  }
  await keep(one);
}

// --- Scrolling

const scroller = byId("scroller");
const isAtBottom = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
const toBottom = () => (scroller.scrollTop = scroller.scrollHeight);

// --- Input

function resizeInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 260)}px`;
}

function submit() {
  const input = byId("input");
  const text = input.value;
  if (!text.trim() || running.has(chat.id)) return;
  input.value = "";
  resizeInput();
  send(text);
}

function onKey(event) {
  const typing = event.target.matches("textarea, input, select");
  if (event.key === "Escape" && !byId("settings").open) {
    running.get(chat.id)?.abort();
    showSidebar(false);
  } else if (event.ctrlKey && event.shiftKey && event.code === "KeyE") {
    event.preventDefault();
    showEngine(!settings.engine);
  } else if (event.ctrlKey && event.shiftKey && event.code === "KeyO") {
    event.preventDefault();
    newChat();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    byId("input").focus();
  }
}

// --- Panels

function showSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  byId("menu").setAttribute("aria-expanded", String(open));
  showShade();
}

function showEngine(open, { remember = true } = {}) {
  if (remember) changeSettings({ engine: open });
  document.body.classList.toggle("engine-open", open);
  byId("open-engine").setAttribute("aria-expanded", String(open));
  engine.setOpen(open);
  showShade();
}

function showShade() {
  const { classList } = document.body;
  const covers = classList.contains("sidebar-open") || classList.contains("engine-open");
  byId("shade").hidden = !(covers && NARROW.matches);
}

function showTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
}

function toggleTheme() {
  const dark = settings.theme
    ? settings.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  changeSettings({ theme: dark ? "light" : "dark" });
  showTheme();
  engine.tree.draw();
}

function showBanner(sentence) {
  byId("banner").textContent = sentence;
  byId("banner").hidden = !sentence;
}

function needKey(sentence) {
  if (byId("settings").open) return;
  showBanner(sentence);
  openSettings(chat.system, key.get());
  byId("settings").querySelector("[name=key]").focus();
}

function takeSettings() {
  const read = readSettings();
  if (read === null) return;
  chat.system = read.system;
  keep(chat);
  const isNew = read.key !== key.get();
  key.set(read.key);
  if (isNew) connect();
}

// --- Start

/** Find out what is served; waits while the server starts. */
async function connect() {
  try {
    const [model] = await getModels();
    byId("model").textContent = model.id;
    byId("empty-model").textContent = model.id;
    showBanner("");
    engine.poll();
  } catch (error) {
    if (error.status === 401) {
      needKey(error.message);
      return;
    }
    showBanner(stateSentence(await getReady()) || error.message);
    setTimeout(connect, 1500);
  }
}

async function importFile(file) {
  try {
    const read = await storage.importConversations(file);
    for (const one of read) await storage.saveConversation(one);
    chats = await storage.loadConversations();
    openChat(chats.find((one) => one.id === read[0].id));
    announce(`${read.length} chats added.`);
  } catch (error) {
    showBanner(error.message);
  }
}

function listen() {
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  byId("input").addEventListener("input", resizeInput);
  byId("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  document.addEventListener("keydown", onKey);
  const click = (id, action) => byId(id).addEventListener("click", action);
  click("stop", () => running.get(chat.id)?.abort());
  click("new-chat", newChat);
  click("menu", () => showSidebar(!document.body.classList.contains("sidebar-open")));
  click("theme", toggleTheme);
  click("open-settings", () => openSettings(chat.system, key.get()));
  click("settings-cancel", () => byId("settings").close());
  click("settings-save", takeSettings);
  click("settings-reset", () => {
    const { theme, engine: shown } = settings;
    changeSettings({ ...DEFAULTS, theme, engine: shown });
    openSettings(chat.system, key.get());
  });
  click("open-engine", () => showEngine(!document.body.classList.contains("engine-open")));
  click("close-engine", () => showEngine(false));
  click("engine-wide", () => {
    const wide = document.body.classList.toggle("engine-wide");
    byId("engine-wide").setAttribute("aria-pressed", String(wide));
  });
  click("shade", () => {
    showSidebar(false);
    showEngine(false);
  });
  click("export", () => storage.exportConversations(chats));
  click("import", () => byId("import-file").click());
  byId("import-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) importFile(file);
  });
  NARROW.addEventListener("change", showShade);
}

async function start() {
  showTheme();
  listen();
  try {
    chats = await storage.loadConversations();
  } catch (error) {
    showBanner(`This browser keeps no chats: ${error.message}`);
  }
  chat = chats[0] ?? chat;
  showChat();
  showEngine(settings.engine && !NARROW.matches, { remember: false });
  byId("input").focus();
  connect();
}

start();
