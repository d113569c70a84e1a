"""`minisrv simulate`: from a trace file to a table and figures."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from minisrv.commands import cli
from minisrv.simulation import calibrate
from tests.support.server_process import ServerProcess

ROOT = Path(__file__).parent.parent.parent
MODEL = str(ROOT / "benchmark/models/Qwen3-8B")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Forty requests in Mooncake's form, all of which begin with the same block."""
    path = tmp_path / "trace.jsonl"
    rows = [
        {
            "timestamp": 200 * n,
            "input_length": 1500,
            "output_length": 20,
            "hash_ids": [0, n, 100 + n],
        }
        for n in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_trace_gives_a_table_and_figures(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = trace.with_suffix(".figures.json")
    command = ["simulate", MODEL, "--gpu", "H100", "--trace", str(trace), "--json", str(figures)]
    assert cli.main(command) == 0
    result = json.loads(figures.read_text())
    assert result["requests"] == 40
    assert result["refused"] == 0
    assert result["hit_rate"] == pytest.approx(39 * 512 / (40 * 1500))
    assert 0.005 < result["itl_p50"] < 0.03
    assert result["good_share"] == 1
    printed = capsys.readouterr().out
    assert "H100 80GB" in printed
    assert "100.0% of requests" in printed
    slower = [*command, "--efficiency", "0.35", "--duration", "4"]
    assert cli.main(slower) == 0
    assert json.loads(figures.read_text())["requests"] == 20
    assert json.loads(figures.read_text())["itl_p50"] > 1.5 * result["itl_p50"]


def test_a_running_server_is_measured_and_simulated(
    trace: Path,
    demo_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With few measurements. The times of this machine are not known, so only their order is."""
    monkeypatch.setattr(calibrate, "_prompt_lengths", lambda shape, largest: [16, 512])
    monkeypatch.setattr(calibrate, "_batches", lambda shape, largest: [(1, 33), (16, 33)])
    monkeypatch.setattr(calibrate, "_ROUNDS", 1)
    monkeypatch.setattr(calibrate, "OUTPUT_TOKENS", 16)
    times, figures = trace.with_suffix(".times.json"), trace.with_suffix(".figures.json")
    measure = ["simulate", "--calibrate", demo_server.url, "--step-times", str(times)]
    assert cli.main(measure) == 0
    saved = json.loads(times.read_text())
    prompts, decodes = saved["observations"][:2], saved["observations"][2:]
    assert prompts[1]["seconds"] > prompts[0]["seconds"] > 0
    assert [step["decodes"] for step in decodes] == [1, 16]
    assert saved["model"] == "demo"
    assert saved["shape"]["page_size"] == 16
    assert saved["shape"]["max_prefill_tokens"] == 512
    assert saved["shape"]["overlap_depth"] == 0
    assert 0 < saved["shape"]["request_s"] < 1
    play = ["simulate", "--step-times", str(times), "--trace", str(trace), "--json", str(figures)]
    assert cli.main([*play, "--divide-lengths", "8", "--page-size", "8"]) == 0
    result = json.loads(figures.read_text())
    assert result["hit_rate"] == pytest.approx(39 * 64 / (40 * 187))
    assert result["ttft_p50"] > 2 * saved["shape"]["request_s"]
    assert "demo as measured" in capsys.readouterr().out


def test_a_sweep_says_how_many_gpus_are_enough(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One replica is too slow for the bound on the first token, and more ranks cost GPUs, too."""
    figures, picture = trace.with_suffix(".figures.json"), trace.with_suffix(".svg")
    command = ["simulate", MODEL, "--gpu", "A100", "--trace", str(trace), "--speed", "40"]
    command += ["--sweep", "replicas=1,2,3", "--sweep", "tp=1,2", "--max-ttft", "3"]
    assert cli.main([*command, "--json", str(figures), "--plot", str(picture)]) == 0
    results = json.loads(figures.read_text())
    gpus = {(r["point"]["replicas"], r["point"]["tp"]): r["gpus"] for r in results}
    assert gpus == {(n, tp): int(n) * int(tp) for n in "123" for tp in "12"}
    enough = [r["gpus"] for r in results if r["good_share"] >= 0.9]
    assert 1 < min(enough) < 6
    printed = capsys.readouterr().out
    assert f"enough for 90% of the requests: {min(enough)} GPUs" in printed
    assert cli.main([*command, "--max-ttft", "0.01"]) == 0
    assert "enough for 90% of the requests: none of these" in capsys.readouterr().out
    lines = ElementTree.fromstring(picture.read_text()).findall(".//{*}polyline")
    assert len(lines) == 4 * 2, "a line for each tp in each panel"
    assert all(len(line.attrib["points"].split()) == 3 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H101"], "known GPUs"),
        (["--gpu", "L4", "--max-seq-len", "40960", "--dtype", "float32"], "does not fit"),
        (["--gpu", "H100", "--trace", "missing.jsonl"], "cannot be read"),
        (["--gpu", "H100", "--quantization", "int8"], "int8 is for CPUs only"),
        (["--gpu", "H100", "--sweep", "replicas"], "replicas=1,2,4"),
        (["--gpu", "H100", "--sweep", "tp=1", "--sweep", "tp=2"], "twice"),
        (["--gpu", "H100", "--sweep", "tp=1", "--sweep=--tp=2"], "twice"),
        (["--gpu", "H100", "--json", "/no/such/folder/a.json"], "a.json cannot be written"),
        (["--gpu", "H100", "--sweep", "tp=1", "--plot", "/no/a.svg"], "a.svg cannot be written"),
        (["--gpu", "H100", "--json", f"{__file__}/a.json"], f"there is no directory {__file__}"),
        (["--step-times", "missing.json"], "cannot be read"),
        (["--gpu", "H100", "--calibrate", "http://127.0.0.1:1"], "--step-times"),
        (["--step-times", "new.json", "--calibrate", "127.0.0.1:1"], "is not the URL of a server"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    trace: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", MODEL, "--trace", str(trace), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_point_ends_a_sweep_before_the_first(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["simulate", MODEL, "--gpu", "H100", "--trace", str(trace)]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "--sweep", "replicas=1,none"])
    assert "good" not in capsys.readouterr().out


def test_ctrl_c_ends_a_simulation_without_a_traceback(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minisrv.commands.simulate.simulate", interrupt)
    assert cli.main(["simulate", MODEL, "--gpu", "H100", "--trace", str(trace)]) == 130
