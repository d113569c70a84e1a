// One answer: the request, and what its chunks make of a message.

import { getReady, streamChat } from "./api.js";
import { apiMessages } from "./conversation.js";
import { stateSentence } from "./engine_view.js";
import { requestBody } from "./settings.js";

const SILENCE_MS = 1500;
const count = new Intl.NumberFormat("en");

/** Fill `message` with the answer to the messages up to `asked`.
 *
 * `changed(progress)` is called at most once per frame. A failure becomes a sentence in
 * `message.error`. */
export async function generate(conversation, asked, message, signal, changed) {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
  const state = { progress: "The prompt is on its way.", trouble: "", heard: performance.now() };
  const draw = () => {
    if (state.drawn) return;
    state.drawn = true;
    nextFrame(() => {
      state.drawn = false;
      if (!state.ended) changed(state.progress);
    });
  };
  const watch = setInterval(() => watchSilence(state, draw), SILENCE_MS);
  draw();
  try {
    const body = requestBody(apiMessages(conversation, asked), seed);
    message.stats = { seed: body.seed };
    for await (const chunk of streamChat(body, message.requestId, signal)) {
      state.heard = performance.now();
      state.trouble = "";
      take(message, chunk, state);
      draw();
    }
  } catch (error) {
    if (signal.aborted) {
      message.stopped = true;
    } else {
      message.error = error.message;
      message.unauthorized = error.status === 401;
    }
  } finally {
    clearInterval(watch);
    state.ended = true;
    // Calls that were cut off cannot be answered.
    if (message.calls && (message.stopped || message.error)) delete message.calls;
  }
}

// A hidden page has no frames, but its answer goes on.
function nextFrame(action) {
  if (document.hidden) setTimeout(action, 100);
  else requestAnimationFrame(action);
}

function take(message, chunk, state) {
  const choice = chunk.choices?.[0];
  if (choice) takeChoice(message, choice, state);
  const progress = chunk.prompt_progress ?? choice?.prompt_progress;
  if (progress) {
    const { processed, total, cache } = progress;
    const cached = cache ? `, ${count.format(cache)} from the cache` : "";
    state.progress = `Prompt: ${count.format(processed)} of ${count.format(total)} tokens${cached}`;
  }
  if (chunk.timings) takeTimings(message.stats, chunk.timings);
  if (chunk.usage) takeUsage(message.stats, chunk.usage);
}

function takeChoice(message, { delta = {}, finish_reason: finish }, state) {
  const reasoning = delta.reasoning_content ?? delta.reasoning;
  if (delta.content || reasoning || delta.tool_calls) state.progress = "";
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  if (delta.content) message.content += delta.content;
  for (const part of delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[part.index] ??= { id: "", name: "", args: "" });
    call.id = part.id ?? call.id;
    call.name = part.function?.name ?? call.name;
    call.args += part.function?.arguments ?? "";
  }
  if (finish === "length") message.stats.cut = 1;
}

function takeTimings(stats, timings) {
  stats.ttftMs = timings.queue_ms + timings.prefill_ms;
  stats.decodeMs = timings.decode_ms;
}

function takeUsage(stats, usage) {
  stats.prompt = usage.prompt_tokens;
  stats.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  stats.generated = usage.completion_tokens;
  if (stats.decodeMs > 0 && stats.generated > 1) {
    stats.rate = (1000 * (stats.generated - 1)) / stats.decodeMs;
  }
}

/** After a time without chunks, say why: the engine may be starting again. */
async function watchSilence(state, draw) {
  if (performance.now() - state.heard < SILENCE_MS) return;
  const sentence = stateSentence(await getReady());
  if (sentence === state.trouble) return;
  state.progress = sentence || (state.trouble ? "" : state.progress);
  state.trouble = sentence;
  draw();
}
