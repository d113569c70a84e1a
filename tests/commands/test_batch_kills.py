"""minisrv batch is killed, or its engine is: each line is answered once, as in an uncut run."""

from __future__ import annotations

import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from minisrv.commands import batch
from minisrv.commands.batch_output import Output
from minisrv.errors import ConfigError
from tests.support.server_process import suspended, wait_until

FLAGS = ["--max-tokens", "20", "--kv-memory", "64MiB", "--num-threads", "1", "--dtype", "float32"]
# Few at once, so that the lines end one after another.
FEW = ["--max-running-requests", "4"]


def make_input(path: Path, num_lines: int) -> Path:
    """Greedy and seeded lines of all forms, and some that are answered with an error."""
    lines: list[dict[str, Any]] = []
    for index in range(num_lines):
        fields: dict[str, Any] = {"ignore_eos": True, "temperature": 0}
        if index % 2:
            fields |= {"temperature": 1.3, "seed": index, "n": 1 + index % 3}
        if index % 11 == 5:
            fields["max_tokens"] = -1
        body = {"prompt": [f"line {index}", "other"], **fields}
        match index % 3:
            case 0:
                lines.append({"prompt": f"line {index}", "id": f"line-{index}", **fields})
            case 1:
                lines.append({"custom_id": f"c{index}", "url": "/v1/completions", "body": body})
            case 2:
                chat = [{"role": "user", "content": f"line {index}"}]
                lines.append({"messages": chat, "logprobs": True, **fields})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def command(model: Path | str, source: Path, target: Path, *flags: str) -> list[str]:
    paths = ["--input", str(source), "--output", str(target)]
    return ["--model", str(model), *paths, *FLAGS, *FEW, *flags]


def answers_in(target: Path) -> dict[str | int, Any]:
    """What must be the same in each run, by line. The file has whole lines, each of them once."""
    found: dict[str | int, Any] = {}
    content = target.read_bytes()
    assert content.endswith(b"\n") or not content
    for line in content.splitlines():
        answer = json.loads(line)
        key = answer["custom_id"] if "custom_id" in answer else answer["index"]
        assert key not in found
        body = answer["response"]["body"] if "custom_id" in answer else answer
        if "choices" in body:
            found[key] = [(choice["text"], choice["finish_reason"]) for choice in body["choices"]]
        elif "error" in body:
            found[key] = body["error"]
        else:
            found[key] = [body.get(name) for name in ("id", "text", "texts", "finish_reason")]
    return found


def size_of(target: Path) -> int:
    return target.stat().st_size if target.exists() else 0


@contextmanager
def running(
    arguments: list[str], has_begun: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, once it `has_begun`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minisrv", "batch", *arguments], stderr=subprocess.PIPE
    )
    try:
        while not has_begun() and process.poll() is None:
            time.sleep(0.001)
        yield process
    finally:
        process.kill()
        process.communicate()


def killed_after(delay_s: float) -> Callable[[subprocess.Popen[bytes], Path], None]:
    def kill(process: subprocess.Popen[bytes], target: Path) -> None:
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)

    return kill


def killed_while_it_loads(process: subprocess.Popen[bytes], target: Path) -> None:
    assert not size_of(target)
    process.send_signal(signal.SIGKILL)


def cut_in_a_line(process: subprocess.Popen[bytes], target: Path) -> None:
    """Let the kernel refuse to write more than a part of the next line, as on a full disk."""
    with suspended(psutil.Process(process.pid)) as stopped:  # else it could write a line meanwhile
        wait_until(lambda: stopped.status() == psutil.STATUS_STOPPED)
        limit = size_of(target) + 60
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert process.wait(60) == 1
    assert not target.read_bytes().endswith(b"\n")


def test_a_batch_that_is_killed_at_any_time_goes_on_where_it_stopped(
    model_dir: Path, tmp_path: Path
) -> None:
    source = make_input(tmp_path / "in.jsonl", 60)
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch.main(command(model_dir, source, whole)) == 0
    uncut = answers_in(whole)
    assert len(uncut) == 60
    arguments, rng = command(model_dir, source, target), random.Random(5)
    with running(arguments, target.exists) as process:
        killed_while_it_loads(process, target)
    for stop in (cut_in_a_line, killed_after(rng.uniform(0.0, 0.2))):
        before = size_of(target)
        with running(arguments, lambda size=before: size_of(target) > size) as process:
            stop(process, target)
        assert before < size_of(target) < size_of(whole)
        if target.read_bytes().endswith(b"\n"):
            tear_last_line(target, rng)
    assert batch.main(arguments) == 0
    assert answers_in(target) == uncut


def tear_last_line(target: Path, rng: random.Random) -> None:
    """Leave what a kill in the middle of a write leaves."""
    content = target.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    target.write_bytes(content[: rng.randrange(last, len(content))])


@pytest.mark.soak
def test_a_rank_that_is_killed_costs_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_input(tmp_path / "in.jsonl", 12)
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch.main(command("demo", source, whole)) == 0
    # Without restarts the open lines are not answered, not even with an error.
    with rank_killed_at_line(monkeypatch, 2):
        assert batch.main(command("demo", source, target, "--tp", "2", "--restart-limit", "0")) == 1
    answers = answers_in(target)
    assert 2 <= len(answers) < 12
    with rank_killed_at_line(monkeypatch, 2):
        assert batch.main(command("demo", source, target, "--tp", "2")) == 0
    assert answers_in(target) == answers_in(whole)


@contextmanager
def rank_killed_at_line(monkeypatch: pytest.MonkeyPatch, line: int) -> Iterator[None]:
    """Kill the rank of this process when it writes its `line`-th answer."""
    num_lines, num_killed = 0, 0

    def write_and_kill(output: Output, *answer: Any) -> None:
        nonlocal num_lines, num_killed
        write(output, *answer)
        num_lines += 1
        if num_lines == line:
            for child in psutil.Process().children():
                if "minisrv.engine.parallel" in child.cmdline():
                    child.kill()
                    num_killed += 1

    write = Output.write
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", write_and_kill)
        yield
    assert num_killed == 1


def test_two_processes_cannot_write_the_same_answers(tmp_path: Path) -> None:
    target, purpose = tmp_path / "out.jsonl", {"input": "a", "settings": "b"}
    first = Output(target, purpose)
    first.write(0, {"index": 0})
    with pytest.raises(ConfigError, match="another process is writing"):
        Output(target, purpose)
    first.close()
    second = Output(target, purpose)
    assert second.done == {0}
    second.close()


WHOLE = [b'{"index": 0}\n', b'{"custom_id": "a", "index": 7}\n']
TORN = [b"{", b'{"index": 1', b'{"index": 1}', b"\0\0\0\0", b'{"ind\n', b"7\n", b"[]\n", b"\0\n"]


@pytest.mark.parametrize("torn", TORN)
def test_a_damaged_end_is_cut_off_and_damage_before_it_is_named(
    tmp_path: Path, torn: bytes
) -> None:
    target, purpose = tmp_path / "out.jsonl", {"input": "a", "settings": "b"}
    Output(target, purpose).close()
    target.write_bytes(b"".join([*WHOLE, torn]))
    output = Output(target, purpose)
    assert output.done == {0, "a"}
    output.write(1, {"index": 1})
    output.close()
    assert target.read_bytes() == b"".join([*WHOLE, b'{"index": 1}\n'])
    damaged = b"".join([WHOLE[0], torn.rstrip(b"}\n") + b"\n", WHOLE[1]])
    target.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"line 2 of .*out\.jsonl is not an answer"):
        Output(target, purpose)
    assert target.read_bytes() == damaged
