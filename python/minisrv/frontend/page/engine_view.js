// The side view of the engine: once a second while it is open and the page is visible.

import { getLoad, getReady, getTree } from "./api.js";
import { byId } from "./dom.js";
import { TreeView } from "./tree_view.js";

const PERIOD_MS = 1000;
const HISTORY = 120;
const count = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

export class EngineView {
  /** `lastRequest` returns the id of the last request of this chat; `withText` whether to show text. */
  constructor(lastRequest, withText) {
    this.lastRequest = lastRequest;
    this.withText = withText;
    this.before = null;
    this.hits = [];
    this.open = false;
    this.timer = 0;
    this.tree = new TreeView(byId("tree"), byId("tree-tip"), () => this.showZoom());
    byId("tree-whole").addEventListener("click", () => {
      this.tree.zoom(0);
      this.showZoom();
    });
    document.addEventListener("visibilitychange", () => this.poll());
  }

  setOpen(open) {
    this.open = open;
    this.poll();
  }

  async poll() {
    clearTimeout(this.timer);
    if (!this.open || document.hidden) return;
    const round = (this.round = {});
    await Promise.all([this.pollLoad(), this.pollTree()]);
    if (this.round !== round) return;
    this.timer = setTimeout(() => this.poll(), PERIOD_MS);
  }

  async pollLoad() {
    try {
      this.showLoad(await getLoad());
      this.say("");
    } catch (error) {
      this.say(error.status === 503 ? stateSentence(await getReady()) : error.message);
    }
  }

  say(sentence) {
    byId("engine-note").textContent = sentence;
    byId("engine-note").hidden = !sentence;
  }

  showLoad(load) {
    if (load.num_running_reqs === undefined) return; // no figures have come from the engine yet
    byId("running").textContent = count.format(load.num_running_reqs);
    byId("waiting").textContent = count.format(load.num_waiting_reqs);
    byId("pages-used").textContent = percent(load.token_usage);
    const now = { ...load, at: performance.now() };
    const { before } = this;
    this.before = now;
    if (!before || now.prompt_tokens < before.prompt_tokens) return;
    const rate = (1000 * (now.output_tokens - before.output_tokens)) / (now.at - before.at);
    byId("rate").textContent = rate < 10 ? rate.toFixed(1) : count.format(Math.round(rate));
    const prompt = now.prompt_tokens - before.prompt_tokens;
    const cached = now.cached_tokens - before.cached_tokens;
    this.hits.push(prompt ? cached / prompt : null);
    this.hits = this.hits.slice(-HISTORY);
    byId("hit-rate").textContent = now.prompt_tokens ? percent(now.cached_tokens / now.prompt_tokens) : "-";
    drawHits(byId("hits"), this.hits);
  }

  async pollTree() {
    const requestId = this.lastRequest();
    try {
      const tree = await getTree(requestId, this.withText());
      this.showTree(tree, requestId);
    } catch (error) {
      const closed = error.status === 401 || error.status === 403;
      byId("tree-note").textContent = closed
        ? "The tree is shown with the admin key, or on this machine when no keys are set."
        : error.message;
      byId("tree-box").hidden = closed;
    }
  }

  showTree({ nodes, num_nodes, path, pages, page_size }, requestId) {
    byId("tree-box").hidden = false;
    showPages(pages);
    this.tree.show(nodes, path ?? []);
    if (!num_nodes) {
      byId("tree-note").textContent = "The cache is empty.";
      return;
    }
    const shown = nodes.length < num_nodes ? `${count.format(nodes.length)} of ` : "";
    const parts = [`${shown}${count.format(num_nodes)} nodes, ${count.format(pages.tree * page_size)} tokens.`];
    if (requestId && path?.length) {
      const lit = new Set(path);
      const mine = nodes.filter((node) => lit.has(node.id)).reduce((sum, node) => sum + node.tokens, 0);
      parts.push(`This chat: ${count.format(mine)} tokens on ${path.length} ${path.length === 1 ? "node" : "nodes"}, lit.`);
    }
    byId("tree-note").textContent = parts.join(" ");
    byId("tree").setAttribute("aria-label", `The prefix cache as a tree. ${parts.join(" ")}`);
    this.showZoom();
  }

  showZoom() {
    byId("tree-whole").hidden = this.tree.rootId === 0;
  }
}

/** A sentence for a state of /ready, "" when requests are served. */
export function stateSentence(state) {
  switch (state.status) {
    case "ready":
      return "";
    case "loading":
      return `The server is starting: ${state.phase}, ${Math.round(100 * state.progress)} %.`;
    case "restarting":
      return "A part of the engine is being started again. Answers go on by themselves.";
    case "draining":
      return "The server is stopping and takes no new requests.";
    case "dead":
      return "The engine has ended. Start the server again.";
    default:
      return "The server cannot be reached. Is it still running?";
  }
}

function showPages({ total, used, tree }) {
  // Pages that a request and the tree share count as used.
  const cached = Math.max(0, Math.min(tree, total - used));
  byId("bar-used").style.width = `${(100 * used) / total}%`;
  byId("bar-cached").style.width = `${(100 * cached) / total}%`;
  const text = `${count.format(used)} in use, ${count.format(tree)} in the tree, of ${count.format(total)} pages`;
  byId("pages-note").textContent = text;
}

/** The hit rate of each second that had prompts, as bars. */
function drawHits(canvas, hits) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width) return;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const style = getComputedStyle(canvas);
  const step = width / HISTORY;
  hits.forEach((share, i) => {
    const x = width - (hits.length - i) * step;
    context.fillStyle = style.getPropertyValue(share === null ? "--line" : "--accent");
    const high = share === null ? 1 : Math.max(2, share * height);
    context.fillRect(x, height - high, Math.max(1, step - 1), high);
  });
}
