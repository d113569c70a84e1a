// Elements without HTML: text only ever becomes a text node.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props`: attributes, except `on` (listeners by event name) and `text`. */
export function el(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (name === "text") {
      made.textContent = value;
    } else {
      made.setAttribute(name, value === true ? "" : value);
    }
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A drawing of icons.svg; it says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `page/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon and a name that is spoken and shown as a tooltip. */
export function iconButton(name, label, click, extra = "") {
  return el(
    "button",
    { type: "button", class: `icon-button ${extra}`, title: label, "aria-label": label, on: { click } },
    icon(name),
  );
}

export const byId = (id) => document.getElementById(id);

/** A button that copies; its icon is a tick for a moment. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    await copy(text());
    button.replaceChildren(icon("check"));
    announce("Copied");
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

// navigator.clipboard exists only over HTTPS and on this machine.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "off-screen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** Say a sentence to those who listen to the page. */
export function announce(sentence) {
  byId("status").textContent = sentence;
}
