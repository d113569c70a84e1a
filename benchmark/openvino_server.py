"""An HTTP server around OpenVINO GenAI, which has none, for peers.py.

python benchmark/openvino_server.py FILE.gguf --port PORT --threads N, with a Python that has
`openvino-genai`. It streams completions of prompts in token ids, greedily and without an end token,
as peers.py asks for them; a chunk has one token. All requests share one ContinuousBatchingPipeline.
"""

from __future__ import annotations

import argparse
import json
import queue
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import openvino
import openvino_genai

CACHE_GB, MAX_BATCHED_TOKENS = 4, 2048


class Engine:
    """Runs the requests that `generate` puts in, in a thread of its own."""

    def __init__(self, file: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = MAX_BATCHED_TOKENS
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            file, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._new: queue.SimpleQueue[tuple[list[int], int, queue.SimpleQueue[int]]]
        self._new = queue.SimpleQueue()
        Thread(target=self._run, daemon=True).start()

    def generate(self, ids: list[int], max_tokens: int) -> queue.SimpleQueue[int]:
        """Start a request. Its max_tokens tokens are put into the queue that this returns."""
        tokens: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._new.put((ids, max_tokens, tokens))
        return tokens

    def _run(self) -> None:
        open_requests: list[tuple[Any, queue.SimpleQueue[int]]] = []
        count = 0
        while True:
            while not open_requests or not self._new.empty():
                ids, max_tokens, tokens = self._new.get()
                config = openvino_genai.GenerationConfig()
                config.max_new_tokens, config.ignore_eos = max_tokens, True
                prompt = openvino.Tensor(np.array([ids], np.int64))
                handle = self._pipeline.add_request(count, prompt, config)
                open_requests.append((handle, tokens))
                count += 1
            self._pipeline.step()
            for handle, tokens in open_requests:
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            tokens.put(token)
            running = openvino_genai.GenerationStatus.RUNNING
            open_requests = [one for one in open_requests if one[0].get_status() == running]


class Handler(BaseHTTPRequestHandler):
    """GET /health and POST /v1/completions."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    engine: Engine

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids, max_tokens = body["prompt"], body["max_tokens"]
        tokens = self.engine.generate(ids, max_tokens)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(max_tokens):
            choice = {"index": 0, "text": f" {tokens.get()}", "finish_reason": None}
            if i == max_tokens - 1:
                choice["finish_reason"] = "length"
            self._send(json.dumps({"choices": [choice]}))
        usage = {"prompt_tokens": len(ids), "completion_tokens": max_tokens}
        self._send(json.dumps({"choices": [], "usage": usage}))
        self._send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *_: object) -> None:
        """Nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    Handler.engine = Engine(args.file, args.threads)
    ThreadingHTTPServer(("127.0.0.1", args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
