"""Put bugs into a copy of the package, one at a time, and name the test that fails: fourteen of the
cache, seven that would let one request harm others or a stop lose some, and five that would let the
death of a process change an answer or go on without end.

Exits with status 1 if the tests miss a bug. Run: python scripts/seeded_bugs.py [NUMBER ...]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE_TESTS = ["tests/kvcache", "tests/scheduler"]


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    old: str
    new: str


CACHE_BUGS = [
    Bug(
        "a pin is not released",
        "kvcache/manager.py",
        "        self.tree.unpin(lease.node, lease.last_step)\n        unused",
        "        unused",
    ),
    Bug(
        "a node is pinned after the allocation",
        "kvcache/manager.py",
        "        node = self.tree.end_of(found)\n        self.tree.pin(node)\n",
        "        node = self.tree.end_of(found)\n"
        "        self.evict(self.pages_for(len(token_ids)) - end - self.pages.num_free)\n"
        "        self.tree.pin(node)\n",
    ),
    Bug(
        "a split is off by one",
        "kvcache/radix_tree.py",
        "self._split(node, match.end - node.start)",
        "self._split(node, max(1, match.end - node.start - 1))",
    ),
    Bug(
        "duplicate pages are freed without remapping the row",
        "kvcache/manager.py",
        "            self._page_writes[lease.row, column] = page\n        lease.pages[shared:end]",
        "            if column >= len(lease.pages):\n"
        "                self._page_writes[lease.row, column] = page\n"
        "        lease.pages[shared:end]",
    ),
    Bug(
        "pages are freed before their step settles",
        "kvcache/manager.py",
        "self.pages.release(unused, lease.last_step)",
        "self.pages.release(unused, 0)",
    ),
    Bug(
        "a pinned node is evicted",
        "kvcache/radix_tree.py",
        "            if node.refs or node.children or",
        "            if node.children or",
    ),
    Bug(
        "a partial page is inserted",
        "kvcache/manager.py",
        "start, end = lease.num_shared, computed // self.page_size",
        "start, end = lease.num_shared, self.pages_for(computed)",
    ),
    Bug(
        "a row is stale after reuse",
        "kvcache/manager.py",
        "            for column, page in enumerate(taken, len(lease.pages)):\n"
        "                self._page_writes[lease.row, column] = page\n",
        "            for column, page in enumerate(taken, len(lease.pages)):\n"
        "                if column or not self.pages.settled_step:\n"
        "                    self._page_writes[lease.row, column] = page\n",
    ),
    Bug(
        "a preemption keeps a page that is not computed",
        "scheduler/scheduler.py",
        "        known = min(request.num_computed, request.num_tokens)\n",
        "        known = request.num_tokens\n",
    ),
    Bug(
        "a scheduled page is read before its step",
        "kvcache/radix_tree.py",
        "            if child.fill_step == step:",
        "            if child.fill_step == -1:",
    ),
    Bug(
        "evicted pages are freed before their step settles",
        "kvcache/manager.py",
        "            self.pages.release(pages, last_step)",
        "            self.pages.release(pages, 0)",
    ),
    Bug(
        "a salt is forgotten when the first page is shared",
        "kvcache/manager.py",
        "token_ids, own, step, lease.salt)",
        "token_ids, own, step)",
    ),
    Bug(
        "a demand is remembered although a page was unpinned",
        "kvcache/radix_tree.py",
        "                self.num_evictable += len(part.pages)\n"
        "                self.num_pin_changes += 1\n",
        "                self.num_evictable += len(part.pages)\n",
    ),
    Bug(
        "a remembered match continues below an evicted node",
        "kvcache/radix_tree.py",
        "(not node.refs or node.start >= known.end)",
        "(node.start >= known.end)",
    ),
]

# Each with the file that has the test which finds it.
SERVER_BUGS = [
    (
        Bug(
            "the permit of a request that was aborted before it was sent is not returned",
            "frontend/registry/registry.py",
            "            else:\n                self._release(request, uid)\n",
            "",
        ),
        "tests/frontend/test_request_registry.py",
    ),
    (
        Bug(
            "the permit of a query is not returned",
            "frontend/registry/queries.py",
            "        future = self._forget(answer.query)\n",
            "        future = self._open.get(answer.query)\n",
        ),
        "tests/processes/test_queries.py",
    ),
    (
        Bug(
            "the deadline of a body is not checked",
            "frontend/http/body.py",
            "asyncio.timeout(BODY_TIMEOUT_S)",
            "asyncio.timeout(None)",
        ),
        "tests/frontend/test_disconnect.py",
    ),
    (
        Bug(
            "the values of a body are not counted before it is built",
            "frontend/http/body.py",
            "    size.check()\n",
            "",
        ),
        "tests/frontend/test_body_size.py",
    ),
    (
        Bug(
            "a refusal at a limit has no Retry-After",
            "frontend/http/errors.py",
            "if error.http_status == NotReadyError.http_status:",
            "if isinstance(error, NotReadyError):",
        ),
        "tests/frontend/test_app.py",
    ),
    (
        Bug(
            "output that nobody reads is kept without limit",
            "frontend/registry/open_request.py",
            "event.num_bytes for event in self.pending.values()) > MAX_UNREAD_BYTES",
            "event.num_bytes for event in self.pending.values()) < 0",
        ),
        "tests/frontend/test_disconnect.py",
    ),
    (
        Bug(
            "a drain does not wait for replies that have not begun",
            "frontend/http/protocol.py",
            "return cycle.response_started or not cycle.more_body",
            "return cycle.response_started",
        ),
        "tests/processes/test_drain.py",
    ),
    (
        Bug(
            "the epoch of a frame is not checked",
            "wire/codec.py",
            "    if values[1] != epoch:\n",
            "    if False:\n",
        ),
        "tests/wire",
    ),
    (
        Bug(
            "a resume forgets the held text of a stop string",
            "detokenizer/worker.py",
            "    _filter_text(request, token_id, text, Finish.NONE)\n",
            "",
        ),
        "tests/scheduler/test_resumed_requests.py",
    ),
    (
        Bug(
            "the journal is one token short",
            "frontend/registry/open_request.py",
            ".extend(event.token_ids)",
            ".extend(event.token_ids[:-1])",
        ),
        "tests/frontend/test_resume.py",
    ),
    (
        Bug(
            "a suspect is never cleared",
            "frontend/registry/open_request.py",
            "before is None or now - before >= CLEARING_TOKENS else",
            "before is None else",
        ),
        "tests/frontend/test_resume.py",
    ),
    (
        Bug(
            "the counts of penalties leave out the output of an earlier engine",
            "scheduler/penalties.py",
            "*(r.prefill_ids for r in requests)",
            "*(np.where(np.arange(len(r.prefill_ids)) < len(r.prompt_ids), r.prefill_ids, 0)"
            " for r in requests)",
        ),
        "tests/scheduler/test_resumed_requests.py",
    ),
]


def run(bug: Bug, tests: list[str]) -> str | None:
    """The first test that fails with the bug in place, or None."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "minisrv"
        shutil.copytree(ROOT / "python" / "minisrv", package)
        source = (package / bug.file).read_text()
        assert source.count(bug.old) == 1, f"{bug.file} does not contain the code of: {bug.name}"
        (package / bug.file).write_text(source.replace(bug.old, bug.new))
        # A bug may make a test wait for something that never comes.
        options = ["-x", "-q", "-m", "not soak", "-p", "no:cacheprovider", "--timeout", "120"]
        # The pythonpath of pyproject.toml would put the unmodified package first.
        options += ["-o", f"pythonpath={folder} ."]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": folder,
                "HYPOTHESIS_STORAGE_DIRECTORY": folder,
                "NO_SHRINK": "1",
                "NEVER_CORRUPT_EXAMPLES": "300",
                "COLUMNS": "250",
            },
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)(.*)", done.stdout, re.MULTILINE)
    assert done.returncode == (1 if failed else 0), done.stdout[-2000:]
    return failed and failed[1] + failed[2][:110]


def report(bugs: list[tuple[Bug, list[str]]]) -> int:
    """Try bugs on their tests, all or those whose numbers are arguments; 1 if one is missed."""
    wanted = {int(number) for number in sys.argv[1:]} or set(range(1, len(bugs) + 1))
    missed = 0
    for number, (bug, tests) in enumerate(bugs, 1):
        if number in wanted:
            failed = run(bug, tests)
            missed += failed is None
            print(f"{number:2} {bug.name}: {failed or 'NOT CAUGHT'}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    cache_bugs = [(bug, CACHE_TESTS) for bug in CACHE_BUGS]
    sys.exit(report(cache_bugs + [(bug, [test]) for bug, test in SERVER_BUGS]))
