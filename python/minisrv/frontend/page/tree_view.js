// The radix tree as blocks on a canvas: a block hangs below its parent, as wide as the leaves below
// it and as high as its tokens, on a square-root scale. All blocks are drawn in one pass.

const FRESH_S = 60;
const SHADES = 8;
const PATH_SHARE = 0.06;

/** Where each node goes, in units of the whole: { node, x, width, top, bottom } with 0 <= x <= 1.
 *
 * The leaves of `path`, a set of ids, are at least PATH_SHARE wide, so that they can be seen. */
export function layout(nodes, path = new Set(), rootId = 0) {
  const byParent = new Map();
  // Older nodes stay on the left, so that blocks move little.
  for (const node of nodes.toSorted((a, b) => a.id - b.id)) {
    const siblings = byParent.get(node.parent);
    if (siblings) siblings.push(node);
    else byParent.set(node.parent, [node]);
  }
  const root = nodes.find((node) => node.id === rootId);
  const top = root ? [root] : (byParent.get(0) ?? []);
  const order = [];
  const depths = new Map();
  const stack = top.map((node) => [node, 0]);
  while (stack.length) {
    const [node, start] = stack.pop();
    const end = start + node.tokens;
    order.push(node);
    depths.set(node.id, [start, end]);
    for (const child of byParent.get(node.id) ?? []) stack.push([child, end]);
  }
  const wide = PATH_SHARE * order.filter((node) => !byParent.has(node.id)).length;
  const leaves = new Map();
  for (const node of order.toReversed()) {
    const below = (byParent.get(node.id) ?? []).reduce((sum, child) => sum + leaves.get(child.id), 0);
    leaves.set(node.id, below || (path.has(node.id) ? Math.max(1, wide) : 1));
  }
  return place(order, top, byParent, depths, leaves);
}

function place(order, top, byParent, depths, leaves) {
  const deepest = Math.sqrt(Math.max(1, ...order.map((node) => depths.get(node.id)[1])));
  const total = top.reduce((sum, node) => sum + leaves.get(node.id), 0);
  const starts = new Map();
  const spread = (siblings, from) => {
    for (const node of siblings) {
      starts.set(node.id, from);
      from += leaves.get(node.id);
    }
  };
  spread(top, 0);
  return order.map((node) => {
    const from = starts.get(node.id);
    spread(byParent.get(node.id) ?? [], from);
    const [start, end] = depths.get(node.id).map((tokens) => Math.sqrt(tokens) / deepest);
    return { node, x: from / total, width: leaves.get(node.id) / total, top: start, bottom: end };
  });
}

/** Draw blocks into a context of `width` times `height` pixels. `path`: the ids that are lit. */
export function draw(context, blocks, path, width, height, colors) {
  context.clearRect(0, 0, width, height);
  for (const { node, x, width: share, top, bottom } of blocks) {
    const left = x * width;
    const wide = share * width;
    const gap = wide > 4 ? 1 : 0;
    context.fillStyle = colorOf(node, path, colors);
    context.fillRect(left, top * height, wide - gap, Math.max(1, (bottom - top) * height - 1));
  }
  // Once more on top, since a lit block may be narrower than a pixel.
  context.fillStyle = colors.path;
  for (const { node, x, width: share, top, bottom } of blocks) {
    if (!path.has(node.id)) continue;
    const wide = Math.max(2, share * width - 1);
    context.fillRect(x * width, top * height, wide, Math.max(2, (bottom - top) * height - 1));
  }
}

function colorOf(node, path, colors) {
  if (path.has(node.id)) return colors.path;
  if (node.pins) return colors.pinned;
  const age = Math.min(1, node.last_use_s / FRESH_S);
  return colors.shades[Math.round(age * (SHADES - 1))];
}

/** The colours of the theme; the shades fade from a node just used to one that was not for long. */
export function themeColors(element) {
  const style = getComputedStyle(element);
  const read = (name) => style.getPropertyValue(name).trim();
  const shades = Array.from({ length: SHADES }, (_, i) => {
    const share = Math.round((100 * i) / (SHADES - 1));
    return `color-mix(in srgb, ${read("--tree-old")} ${share}%, ${read("--tree-fresh")})`;
  });
  return { path: read("--tree-path"), pinned: read("--tree-pinned"), shades };
}

/** The node at a point, given in shares of the canvas. */
export function nodeAt(blocks, x, y) {
  const hit = blocks.find((b) => x >= b.x && x < b.x + b.width && y >= b.top && y < b.bottom);
  return hit?.node ?? null;
}

/** A canvas that shows the last tree it was given. */
export class TreeView {
  constructor(canvas, tip, changed) {
    this.canvas = canvas;
    this.tip = tip;
    this.nodes = [];
    this.path = new Set();
    this.rootId = 0;
    this.blocks = [];
    canvas.addEventListener("pointermove", (event) => this.showTip(event));
    canvas.addEventListener("pointerleave", () => (tip.hidden = true));
    canvas.addEventListener("click", (event) => {
      this.zoom(this.nodeUnder(event)?.id ?? 0);
      changed();
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  zoom(id) {
    this.rootId = id === this.rootId ? 0 : id;
    this.arrange();
  }

  show(nodes, path) {
    this.nodes = nodes;
    this.path = new Set(path);
    this.arrange();
  }

  arrange() {
    if (!this.nodes.some((node) => node.id === this.rootId)) this.rootId = 0;
    this.blocks = layout(this.nodes, this.path, this.rootId);
    this.draw();
  }

  draw() {
    const ratio = devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    draw(context, this.blocks, this.path, width, height, themeColors(this.canvas));
  }

  nodeUnder(event) {
    const box = this.canvas.getBoundingClientRect();
    return nodeAt(this.blocks, (event.clientX - box.x) / box.width, (event.clientY - box.y) / box.height);
  }

  showTip(event) {
    const node = this.nodeUnder(event);
    this.tip.hidden = node === null;
    if (node === null) return;
    const pages = node.pages === 1 ? "1 page" : `${node.pages} pages`;
    const used = node.last_use_s < 1 ? "now" : `${Math.round(node.last_use_s)} s ago`;
    const pins = node.pins ? `, in use by ${node.pins}` : "";
    this.tip.textContent = `${node.tokens} tokens on ${pages}, used ${used}${pins}`;
    if (node.text !== undefined) this.tip.textContent += `\n${node.text}`;
    const box = this.canvas.parentElement.getBoundingClientRect();
    const x = Math.min(event.clientX - box.x + 12, Math.max(0, box.width - this.tip.offsetWidth));
    this.tip.style.left = `${x}px`;
    this.tip.style.top = `${event.clientY - box.y + 16}px`;
  }
}
