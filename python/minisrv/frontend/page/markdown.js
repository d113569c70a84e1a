// Markdown as elements. marked only reads it; nothing of a text is ever parsed as HTML.

import { lexer } from "./vendor/marked.esm.js";
import { copyButton, el } from "./dom.js";

const SAFE_LINK = /^(https?:|mailto:)/i;
const MAX_DEPTH = 40;

/** Shows a text that grows: only its last block is read again. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.clear();
  }

  clear() {
    this.element.replaceChildren();
    this.text = "";
    this.done = 0; // characters in blocks that cannot change any more
    this.last = []; // the elements of the last block
  }

  show(given) {
    const text = given.replace(/\r\n?/g, "\n");
    if (text === this.text) return;
    if (!text.startsWith(this.text)) this.clear();
    this.text = text;
    for (const element of this.last) element.remove();
    const tokens = read(text.slice(this.done));
    // Blank lines do not end a list: more of it may follow.
    const end = tokens.findLastIndex((token) => token.type !== "space");
    const finished = tokens.slice(0, Math.max(0, end)).map((token) => token.raw).join("");
    const cut = text.startsWith(finished, this.done) ? end : 0;
    const render = (some) => some.flatMap((token) => renderBlock(token, 0));
    this.last = render(tokens.slice(Math.max(0, cut)));
    this.element.append(...render(tokens.slice(0, Math.max(0, cut))), ...this.last);
    this.done += cut > 0 ? finished.length : 0;
  }
}

function read(text) {
  try {
    return lexer(text);
  } catch {
    return [{ type: "text", raw: text, text }];
  }
}

/** The elements of a block, none for blank lines. */
function renderBlock(token, depth) {
  if (depth > MAX_DEPTH) return [el("p", { text: token.raw })];
  const inline = () => renderInline(token.tokens ?? [], depth + 1);
  const blocks = () => token.tokens.flatMap((child) => renderBlock(child, depth + 1));
  switch (token.type) {
    case "space":
    case "def":
      return [];
    case "heading":
      // The page has a heading of its own above the messages.
      return [el(`h${Math.min(6, token.depth + 2)}`, {}, ...inline())];
    case "paragraph":
      return [el("p", {}, ...inline())];
    case "code":
      return [codeBlock(token.text, token.lang ?? "")];
    case "blockquote":
      return [el("blockquote", {}, ...blocks())];
    case "hr":
      return [el("hr")];
    case "list":
      return [list(token, depth)];
    case "table":
      return [table(token, depth)];
    case "text":
      return [el("p", {}, ...(token.tokens ? inline() : [token.text]))];
    default: // HTML is shown as it is written
      return [el("p", { class: "literal", text: token.raw })];
  }
}

/** A block of code with its language and a button that copies it. */
export function codeBlock(text, language) {
  const name = language.split(/\s/)[0].slice(0, 30);
  const header = el(
    "div",
    { class: "code-header" },
    el("span", { text: name || "text" }),
    copyButton("Copy code", () => text),
  );
  const code = el("pre", { tabindex: "0" }, el("code", { text }));
  return el("div", { class: "code-block" }, header, code);
}

function list(token, depth) {
  const items = token.items.map((item) => {
    const content = item.tokens.flatMap((child) => {
      if (child.type === "text" && !item.loose) {
        return renderInline(child.tokens ?? [{ type: "text", text: child.text }], depth + 1);
      }
      return child.type === "checkbox" ? [] : renderBlock(child, depth + 1);
    });
    if (!item.task) return el("li", {}, ...content);
    const box = el("input", { type: "checkbox", disabled: true, checked: item.checked, "aria-label": "task" });
    return el("li", { class: "task" }, box, ...content);
  });
  const start = token.ordered && token.start !== 1 ? token.start : undefined;
  return el(token.ordered ? "ol" : "ul", { start }, ...items);
}

function table(token, depth) {
  const row = (cells, tag) =>
    el(
      "tr",
      {},
      ...cells.map((cell) =>
        el(tag, { class: cell.align && `align-${cell.align}` }, ...renderInline(cell.tokens, depth + 1)),
      ),
    );
  const head = el("thead", {}, row(token.header, "th"));
  const body = el("tbody", {}, ...token.rows.map((cells) => row(cells, "td")));
  const props = { class: "table", tabindex: "0", role: "region", "aria-label": "Table" };
  return el("div", props, el("table", {}, head, body));
}

function renderInline(tokens, depth) {
  return tokens.flatMap((token) => {
    if (depth > MAX_DEPTH) return [token.raw];
    const inside = () => renderInline(token.tokens ?? [], depth + 1);
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return [el(token.type, {}, ...inside())];
      case "codespan":
        return [el("code", { text: token.text })];
      case "br":
        return [el("br")];
      case "link":
        return [link(token.href, inside(), token.raw)];
      case "image": // it would load by itself; a link does not
        return [link(token.href, [`image: ${token.text || token.href}`], token.raw)];
      case "text":
        return token.tokens ? inside() : [decodeEntities(token.text)];
      case "escape":
        return [token.text];
      case "html":
        return [/^<br\s*\/?>$/i.test(token.raw) ? el("br") : token.raw];
      default:
        return [token.raw];
    }
  });
}

// Those that models write; others stay as they are.
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

function decodeEntities(text) {
  return text.replace(/&(amp|lt|gt|quot|apos|nbsp);/g, (_, name) => ENTITIES[name]);
}

function link(href, content, raw) {
  if (!SAFE_LINK.test(href)) return raw;
  const props = { href, target: "_blank", rel: "noopener noreferrer nofollow", title: href };
  return el("a", props, ...content);
}
