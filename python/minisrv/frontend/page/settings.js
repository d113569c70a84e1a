// The settings of requests, the form that changes them, and the request that follows from them.

import { byId } from "./dom.js";
import { loadSettings, saveSettings } from "./storage.js";

export const DEFAULTS = {
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_tokens: "",
  seed: "",
  repetition_penalty: "",
  stop: "",
  thinking: "",
  schema: "",
  tools: "",
  treeText: false,
  theme: "",
  engine: true,
};
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "repetition_penalty"];

export const settings = loadSettings(DEFAULTS);

export function changeSettings(changes) {
  Object.assign(settings, changes);
  saveSettings(settings);
}

/** The sentence that says what is wrong with the settings, or "". */
export function faultOf(given) {
  for (const [name, check] of [
    ["schema", (value) => typeof value === "object" && value !== null && !Array.isArray(value)],
    ["tools", Array.isArray],
  ]) {
    if (!given[name].trim()) continue;
    const wanted = name === "schema" ? "The JSON schema must be an object" : "The tools must be a list";
    try {
      if (!check(JSON.parse(given[name]))) return `${wanted}.`;
    } catch (error) {
      return `${wanted} in JSON: ${error.message}.`;
    }
  }
  return "";
}

/** The body of a chat request. `seed`: the one to use unless the settings have one. */
export function requestBody(messages, seed) {
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  Object.assign(body, { timings: true, return_progress: true });
  for (const name of NUMBERS) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  body.seed = settings.seed === "" ? seed : Number(settings.seed);
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (settings.thinking) body.enable_thinking = settings.thinking === "on";
  if (settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  if (settings.schema.trim()) {
    const schema = JSON.parse(settings.schema);
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  }
  return body;
}

const fields = () => [...byId("settings").querySelectorAll("[name]")];

/** Open the form; `system` is the prompt of the conversation. */
export function openSettings(system, key) {
  for (const field of fields()) {
    if (field.name === "system") field.value = system;
    else if (field.name === "key") field.value = key;
    else if (field.type === "checkbox") field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
  showFault("");
  byId("settings").showModal();
}

function showFault(sentence) {
  byId("settings-fault").textContent = sentence;
  byId("settings-fault").hidden = !sentence;
}

/** Take what the form holds; null, with a sentence in the form, if that makes no sense. */
export function readSettings() {
  const given = {};
  for (const field of fields()) {
    if (!field.checkValidity()) {
      showFault(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
      field.focus();
      return null;
    }
    given[field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  const fault = faultOf(given);
  showFault(fault);
  if (fault) return null;
  const { system, key, ...rest } = given;
  changeSettings(rest);
  byId("settings").close();
  return { system, key };
}
