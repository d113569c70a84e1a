// Conversations in IndexedDB and settings in localStorage: they stay in this browser.

import { readConversation } from "./conversation.js";

const DATABASE = "minisrv";
const STORE = "conversations";
const SETTINGS = "minisrv.settings";

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function inStore(mode, action) {
  const store = (await open()).transaction(STORE, mode).objectStore(STORE);
  const request = action(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All conversations, the last one changed first. */
export async function loadConversations() {
  const all = await inStore("readonly", (store) => store.getAll());
  return all.sort((a, b) => b.updated - a.updated);
}

export const saveConversation = (one) => inStore("readwrite", (store) => store.put(one));
export const deleteConversation = (id) => inStore("readwrite", (store) => store.delete(id));

export function loadSettings(defaults) {
  try {
    return { ...defaults, ...JSON.parse(localStorage.getItem(SETTINGS) ?? "{}") };
  } catch {
    return { ...defaults };
  }
}

export const saveSettings = (settings) => localStorage.setItem(SETTINGS, JSON.stringify(settings));

/** Hand the browser a file with conversations. */
export function exportConversations(conversations) {
  const text = JSON.stringify({ minisrv: 1, conversations }, null, 1);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = `minisrv-chats-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The conversations of such a file, under new ids. Throws an Error with a sentence. */
export async function importConversations(file) {
  let parsed;
  try {
    parsed = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not JSON.`);
  }
  const read = (parsed?.conversations ?? []).map(readConversation).filter((one) => one !== null);
  if (!read.length) throw new Error(`${file.name} has no conversations of this page.`);
  return read;
}
