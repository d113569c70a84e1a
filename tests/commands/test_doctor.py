"""`minisrv doctor`: findings are the engine's own, and say nothing about the user."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from minisrv.commands import cli, doctor
from minisrv.engine.kernels import packed
from minisrv.engine.kernels.compiler import find_compiler, load_library

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    status = cli.main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return status, {finding["name"]: finding for finding in findings}


@needs_compiler
def test_it_names_what_runs_and_the_instructions_that_the_compiler_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, findings = report(capsys)
    assert findings["torch"]["value"].startswith(torch.__version__)
    if not torch.cuda.is_available():
        assert findings["serves with"]["value"].startswith("our operators in C++ and our attention")
    compiler = find_compiler()
    assert compiler is not None
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    paths = {
        "AVX-512 VNNI": "__AVX512VNNI__",
        "AVX-VNNI": "__AVXVNNI__",
        "AVX2": "__AVX2__",
    }
    expected = next((name for name, macro in paths.items() if f"{macro} " in macros), "vectors")
    assert findings["CPU kernels"]["value"].split("bits with ")[1].endswith(expected)


def test_without_a_compiler_it_names_the_remedy_and_what_runs_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    packed.load_packed_library.cache_clear()
    status, findings = report(capsys)
    packed.load_packed_library.cache_clear()
    assert status == 1
    assert "apt-get install g++" in findings["C++ compiler"]["remedy"]
    assert findings["CPU kernels"]["value"] == "not compiled"
    if not torch.cuda.is_available():
        assert findings["serves with"]["value"].startswith(
            "torch's operators and torch's attention"
        )


@needs_compiler
def test_what_the_compiler_says_is_in_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return nothing_of_that_name; }")
    finding = doctor._check_libraries({"bfloat16": lambda: load_library(source)})
    assert "nothing_of_that_name" in finding.remedy


def test_nothing_of_the_environment_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = tmp_path / "ana-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("MINISRV_API_KEY", "MINISRV_ADMIN_KEY", "HF_TOKEN", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "a-secret-value")
    monkeypatch.setattr(doctor, "_TORCH_CHECKS", {"GPU": lambda: 1 / 0})
    for cache in ("", str(tmp_path / "ana-cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        _, findings = report(capsys)
        assert "secret" not in str(findings)
        assert "ana-" not in str(findings)
        assert "ZeroDivisionError" in findings["GPU"]["value"]
    monkeypatch.setattr(doctor.pwd, "getpwuid", lambda uid: type("Entry", (), {"pw_name": "ana"}))
    finding = doctor.Finding("x", f"{home}/lib and /scratch/ana/lib, /opt/ana.old", "/mnt/ana")
    shown = doctor._anonymous(finding)
    assert (shown.value, shown.remedy) == ("~/lib and /scratch/USER/lib, /opt/ana.old", "/mnt/USER")


def test_a_processor_without_avx2_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Old One\nflags\t\t: fpu sse2\n\nmodel name : Second\n")
    finding = doctor.check_processor(cpuinfo)
    assert finding.value.startswith("Old One, ")
    assert "AVX2" in finding.remedy
    cpuinfo.write_text("model name\t: New One\nflags\t\t: fpu avx2 avx512_vnni\n")
    finding = doctor.check_processor(cpuinfo)
    assert finding.value.endswith("cores: avx2, avx512_vnni")
    assert not finding.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines whose torch finds no GPU")
def test_a_gpu_that_torch_cannot_use_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: None)
    assert not doctor.check_gpu().remedy
    monkeypatch.setattr(doctor, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a torch with CUDA" in doctor.check_gpu().remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-smi" in doctor.check_gpu().remedy


def test_a_gpu_without_flashinfer_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert doctor.check_flashinfer().remedy == "pip install 'minisrv[gpu]'"
