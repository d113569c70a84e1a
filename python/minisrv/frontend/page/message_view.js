// The messages of a conversation as elements, and how one of them changes while it is generated.

import { siblings } from "./conversation.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { codeBlock, MarkdownView } from "./markdown.js";

const count = new Intl.NumberFormat("en");

/** One message. `actions`: edit, regenerate, branch, each called with the message. */
export class MessageView {
  constructor(conversation, message, actions) {
    this.message = message;
    this.actions = actions;
    this.place = placeOf(conversation, message);
    this.calls = new Map();
    this.element = el("article", { class: `message ${message.role}`, "data-id": message.id });
    if (message.role === "user") this.buildUser(conversation);
    else if (message.role === "tool") this.buildTool();
    else this.buildAssistant(conversation);
  }

  buildUser(conversation) {
    const { message } = this;
    this.element.setAttribute("aria-label", "You");
    this.body = el("div", { class: "bubble", text: message.content });
    const edit = iconButton("pencil", "Edit", () => this.edit());
    const copy = copyButton("Copy message", () => message.content);
    this.footer = el("div", { class: "actions" }, ...this.branches(conversation), edit, copy);
    this.element.append(this.body, this.footer);
  }

  buildTool() {
    this.element.setAttribute("aria-label", "Result of a tool");
    const summary = el("summary", {}, icon("wrench"), "Result of the tool");
    const pre = el("pre", { tabindex: "0", text: this.message.content });
    this.element.append(el("details", { class: "fold" }, summary, pre));
  }

  buildAssistant(conversation) {
    const { message } = this;
    this.element.setAttribute("aria-label", "Answer");
    this.thought = el("div", { class: "thought" });
    this.thinking = el("summary", {}, icon("thought"), "Reasoning");
    this.reasoning = el("details", { class: "fold", hidden: true }, this.thinking, this.thought);
    this.progress = el("p", { class: "progress", hidden: true });
    this.body = el("div", { class: "prose" });
    this.markdown = new MarkdownView(this.body);
    this.toolCalls = el("div", { class: "calls" });
    this.note = el("p", { class: "note", hidden: true });
    this.stats = el("dl", { class: "stats" });
    const again = iconButton("again", "Answer again", () => this.actions.regenerate(message));
    const copy = copyButton("Copy answer", () => message.content);
    this.footer = el("div", { class: "actions" }, ...this.branches(conversation), copy, again);
    this.element.append(this.reasoning, this.body, this.toolCalls, this.progress, this.note);
    this.element.append(this.stats, this.footer);
    this.update({ running: false });
  }

  /** The place of this branch among others, with buttons to the next and the one before. */
  branches(conversation) {
    const all = siblings(conversation, this.message);
    if (all.length < 2) return [];
    const at = all.indexOf(this.message);
    const step = (name, label, to) => {
      const button = iconButton(name, label, () => this.actions.branch(all[to]));
      button.disabled = !all[to];
      return button;
    };
    return [
      step("left", "Branch before", at - 1),
      el("span", { class: "branch", text: `${at + 1} / ${all.length}` }),
      step("right", "Next branch", at + 1),
    ];
  }

  /** Whether it shows the message as it is in `conversation` now. */
  fits(conversation, message) {
    return this.message === message && this.place === placeOf(conversation, message);
  }

  /** Show what an answer has become. `progress`: a sentence for the time before its first text. */
  update({ running, progress = "" }) {
    const { message } = this;
    this.element.toggleAttribute("data-running", running);
    this.element.setAttribute("aria-busy", String(running));
    this.footer.hidden = running;
    this.reasoning.hidden = !message.reasoning;
    if (message.reasoning) {
      this.thought.textContent = message.reasoning;
      this.thinking.lastChild.textContent = running && !message.content ? "Reasoning..." : "Reasoning";
    }
    this.progress.hidden = !running || !progress;
    this.progress.textContent = progress;
    if (message.json) this.showJson(running);
    else this.markdown.show(message.content);
    this.showCalls();
    this.showNote();
    if (!running) this.showStats();
  }

  showJson(running) {
    let text = this.message.content;
    if (!running) {
      try {
        text = JSON.stringify(JSON.parse(text), null, 2);
      } catch {
        // cut off: shown as it is
      }
    }
    if (!this.json) this.body.replaceChildren((this.json = codeBlock("", "json")));
    this.json.querySelector("code").textContent = text;
  }

  showCalls() {
    for (const [index, call] of (this.message.calls ?? []).entries()) {
      let card = this.calls.get(index);
      if (!card) {
        const name = el("strong");
        const args = el("pre", { tabindex: "0" });
        const title = el("div", { class: "call-name" }, icon("wrench"), "Calls ", name);
        this.toolCalls.append(el("div", { class: "call" }, title, args));
        card = { name, args };
        this.calls.set(index, card);
      }
      card.name.textContent = call.name;
      card.args.textContent = call.args;
    }
  }

  showNote() {
    const { error, stopped, stats } = this.message;
    const cut = stats?.cut ? "The answer reached the limit of its length." : "";
    this.note.textContent = error ?? (stopped ? "You stopped this answer." : cut);
    this.note.hidden = !this.note.textContent;
    this.note.classList.toggle("error", Boolean(error));
  }

  showStats() {
    const { stats } = this.message;
    this.stats.replaceChildren();
    if (!stats) return;
    const show = (name, value, title) => {
      this.stats.append(el("div", { title }, el("dt", { text: name }), el("dd", { text: value })));
    };
    if (stats.prompt !== undefined) {
      show("cached", count.format(stats.cached), "Tokens of the prompt found in the cache");
      show("computed", count.format(stats.prompt - stats.cached), "Tokens of the prompt computed for this answer");
      show("generated", count.format(stats.generated), "Tokens of the answer");
    }
    if (stats.ttftMs !== undefined) {
      show("first token", seconds(stats.ttftMs), "Time to the first token: queue and prompt");
    }
    if (stats.rate) show("tokens/s", stats.rate.toFixed(1), "Tokens per second after the first");
    if (stats.seed !== undefined) show("seed", String(stats.seed), "The same request with this seed gives the same answer");
  }

  /** Replace a message of the user by a form; its text begins a new branch. */
  edit() {
    const area = el("textarea", { rows: "4", "aria-label": "Edit the message" });
    area.value = this.message.content;
    const close = () => form.replaceWith(this.body, this.footer);
    const submit = () => {
      if (!area.value.trim()) return;
      close();
      this.actions.edit(this.message, area.value);
    };
    const cancel = el("button", { type: "button", class: "plain", text: "Cancel", on: { click: close } });
    const send = el("button", { type: "button", class: "primary", text: "Send", on: { click: submit } });
    const form = el("div", { class: "edit" }, area, el("div", { class: "row" }, cancel, send));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        submit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    this.footer.remove();
    this.body.replaceWith(form);
    area.focus();
  }
}

function placeOf(conversation, message) {
  const all = siblings(conversation, message);
  return `${all.indexOf(message)} of ${all.length}`;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** A form for the results of the calls of the last answer. */
export function resultForm(calls, submit) {
  const areas = calls.map((call) => {
    const area = el("textarea", { rows: "2", "aria-label": `Result of ${call.name}` });
    area.placeholder = `Result of ${call.name}`;
    return area;
  });
  const send = () => submit(areas.map((area) => area.value));
  const button = el("button", { type: "button", class: "primary", text: "Send results", on: { click: send } });
  return el("div", { class: "results" }, ...areas, el("div", { class: "row" }, button));
}
