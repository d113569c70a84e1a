"""The script for a machine with a GPU, on one without: it says so, and the rest of it holds."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import build_flashinfer
import gpu_packages
from minisrv.engine.attention.flashinfer import FlashInferAttention
from minisrv.engine.step_buffer import StepBuffer, StepLimits, StepTensors
from tests.gpu.test_gpu_attention import MAX_LEN, NUM_ROWS, SHAPES, STEPS, make_batch, make_pool
from tests.test_missing_packages import PACKAGES

ROOT = Path(__file__).parent.parent
STAGE = re.compile(r"([\w.-]+) +(\d+) +(\S.*)")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU: run the script")


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(ROOT / "python"), "WHEELS": "none"}
    environment = {**os.environ, **paths, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def stages() -> dict[str, tuple[int, list[str]]]:
    """The limit and the arguments of each stage."""
    table = run(["scripts/gpu_check.sh", "--list"]).stdout.splitlines()
    rows = [STAGE.fullmatch(line) for line in table]
    assert all(rows), f"a stage has no limit or no command: {table}"
    found = {
        row[1]: (int(row[2]), re.findall(r'"[^"]*"|\S+', row[3])) for row in rows if row is not None
    }
    assert len(found) == len(table), "two stages have the same name"
    return found


def test_every_stage_has_a_limit_and_runs_files_that_exist() -> None:
    found = stages()
    assert found
    for limit, (script, *arguments) in found.values():
        assert 0 < limit <= 60
        files = [name for name in (script, *arguments) if name.endswith(".py")]
        assert files
        assert all((ROOT / name).is_file() for name in files), files
        if script.startswith("benchmark/offline"):
            assert (ROOT / "benchmark/models" / arguments[arguments.index("--models") + 1]).is_dir()
    assert list(found)[:3] == ["imports", "device", "build"]


def test_the_stages_run_every_test_for_a_gpu_once(capfd: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, without the packages that tests of a GPU must not need: the
    selections of all stages, then the whole folder.
    """
    selections = [arguments for _, (first, *arguments) in stages().values() if first == "pytest"]
    selections = [[word.strip('"') for word in words] for words in [*selections, ["tests/gpu"]]]
    code = f"import sys; sys.modules |= dict.fromkeys({PACKAGES})\n"
    code += """
import json, pytest
from _pytest.mark import deselect_by_keyword

class Selected:
    def pytest_collection_finish(self, session):
        for selection in json.loads(sys.argv[1]):
            files, options = [word for word in selection if word.startswith("tests/")], []
            options = selection[len(files):]
            assert selection == files + options and (not options or options[0] == "-k"), selection
            items = [item for item in session.items if item.nodeid.startswith(tuple(files))]
            session.config.option.keyword = options[1] if options else ""
            deselect_by_keyword(items, session.config)
            found.append([item.nodeid for item in items])

found = []
assert pytest.main(["--collect-only", "-qq", "tests/gpu"], plugins=[Selected()]) == 0
print("\\n" + json.dumps(found))
"""
    done = run([sys.executable, "-c", code, json.dumps(selections)], PYTHONPATH=f"python:{ROOT}")
    assert done.returncode == 0, done.stdout + done.stderr
    *parts, whole = json.loads(done.stdout.splitlines()[-1])
    for selection, part in zip(selections, parts, strict=False):
        assert part, f"{selection} selects no test"
    assert sorted(itertools.chain(*parts)) == sorted(whole)


@pytest.mark.soak
@NO_GPU
def test_every_stage_is_in_the_table_with_its_result(tmp_path: Path) -> None:
    names = ["imports", "device", "kernels"]
    done = run(["scripts/gpu_check.sh", *names], PYTHON=sys.executable, OUT=str(tmp_path))
    assert done.returncode == 1, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == names
    assert [row[1] for row in rows] == ["ok", "failed (1)", "skipped"]
    assert "torch finds no GPU" in rows[1][3]
    assert "skipped" in rows[2][3]
    (page,) = tmp_path.glob("gpu_check_*.md")
    assert page.read_text() == done.stdout
    log = (tmp_path / "log.txt").read_text()
    assert re.findall(r"^== (\S+)$", log, re.MULTILINE) == names


def test_wheels_that_cannot_be_installed_do_not_hide_the_first_stage(tmp_path: Path) -> None:
    (tmp_path / "no_wheel.whl").write_bytes(b"")
    command = ["scripts/gpu_check.sh", "imports"]
    done = run(command, PYTHON=sys.executable, OUT=str(tmp_path), WHEELS=str(tmp_path))
    assert "cannot be installed" in done.stderr
    assert "| imports | ok |" in done.stdout


def test_a_stage_that_is_none_is_refused(tmp_path: Path) -> None:
    for stage in ("everything", "bench-GPT-9", "kernel"):
        done = run(["scripts/gpu_check.sh", stage], PYTHON=sys.executable, OUT=str(tmp_path))
        assert done.returncode == 2
        assert f"there is no stage {stage}" in done.stderr


@pytest.mark.soak
def test_a_stage_is_cut_off_when_the_time_is_over(tmp_path: Path) -> None:
    done = run(
        ["scripts/gpu_check.sh", "host", "kernels"],
        PYTHON=sys.executable,
        OUT=str(tmp_path),
        BUDGET_S="4",  # enough for the first stage to begin on any machine
    )
    assert done.returncode == 1
    assert "| host | cut off |" in done.stdout
    assert "| kernels | no time left |" in done.stdout


def third_party_imports(roots: list[Path]) -> set[str]:
    """The packages that these files import, and the files of the project that they import."""
    folders = [ROOT / name for name in ("python", "scripts", "benchmark", "")]
    seen: set[Path] = set()
    packages: set[str] = set()
    waiting = list(roots)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imported_names(path):
            parts = name.split(".")
            ours = [
                folder.joinpath(*parts[:end]).with_suffix(".py")
                for folder in folders
                for end in (len(parts), len(parts) - 1)
                if end
            ]
            ours += [folder.joinpath(*parts, "__init__.py") for folder in folders]
            existing = [path for path in ours if path.is_file()]
            waiting += existing
            if not existing and not any((folder / parts[0]).is_dir() for folder in folders):
                packages.add(parts[0])
    return packages - set(sys.stdlib_module_names)


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_the_list_of_packages_covers_what_the_stages_import() -> None:
    files = {ROOT / word for _, words in stages().values() for word in words if ".py" in word}
    listed = gpu_packages.EXPECTED.keys() | gpu_packages.CARRIED.keys()
    only_for_gguf_files = {"gguf"}
    needed = third_party_imports([*files, ROOT / "tests/gpu/conftest.py"]) - only_for_gguf_files
    assert needed <= listed


@pytest.mark.soak
def test_the_list_of_packages_covers_what_flashinfer_imports() -> None:
    """Only packages that the listed ones require exist for this process."""
    pytest.importorskip("flashinfer")
    code = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

sys.path.insert(0, "scripts")
import gpu_packages

allowed, waiting = set(), [*gpu_packages.EXPECTED.values(), *gpu_packages.CARRIED.values()]
while waiting:
    name = re.sub("[-_.]+", "-", waiting.pop()).lower()
    if name in allowed:
        continue
    allowed.add(name)
    try:
        needs = requires(name) or []
    except PackageNotFoundError:
        continue
    if name not in gpu_packages.CARRIED.values():
        waiting += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
for module, names in packages_distributions().items():
    if not {re.sub("[-_.]+", "-", name).lower() for name in names} & allowed:
        sys.modules[module] = None
import flashinfer, flashinfer.jit
assert sys.modules["fastapi"] is None
"""
    done = run([sys.executable, "-c", code], FLASHINFER_CUDA_ARCH_LIST="9.0a")
    assert done.returncode == 0, done.stderr


def test_each_missing_package_is_named_in_one_sentence() -> None:
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import gpu_packages\n"
        "gpu_packages.CARRIED |= {'no_such_a': 'package-a', 'no_such_b': 'package-b'}\n"
        "sys.exit(gpu_packages.check())"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first.startswith("package-a is not installed: ")
    assert second.startswith("package-b is not installed: ")
    assert "torch" not in done.stdout


def flashinfer_names(*options: str, base: Path) -> list[str]:
    pytest.importorskip("flashinfer")
    done = run(
        [sys.executable, "scripts/build_flashinfer.py", "--list", *options],
        FLASHINFER_WORKSPACE_BASE=str(base),
        FLASHINFER_CUDA_ARCH_LIST="9.0a",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_options_choose_the_modules(tmp_path: Path) -> None:
    norm, silu, *attention = flashinfer_names(
        "--head-dims", "128", "--kv-dtypes", "auto", "fp8", base=tmp_path
    )
    assert (norm, silu) == ("norm", "silu_and_mul")
    assert [name.split("_dtype_o_")[0] for name in attention] == [
        "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16",
        "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_e4m3",
    ]
    assert all("head_dim_qk_128_head_dim_vo_128_posenc_0_use_swa_False" in n for n in attention)


class Asked(Exception):
    """The wrapper has asked for the module of this name."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the modules that scripts/gpu_check.sh has built."""
    return flashinfer_names(base=tmp_path_factory.mktemp("flashinfer"))


@pytest.mark.parametrize("module", build_flashinfer.CHECKED, ids=str)
def test_the_engine_asks_for_the_modules_that_are_built(
    module: build_flashinfer.Attention, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's own wrappers, on a CPU up to the place where they load their module."""
    flashinfer = pytest.importorskip("flashinfer")
    name = built[2 + build_flashinfer.CHECKED.index(module)]
    uri = flashinfer.jit.attention.modules.get_batch_prefill_uri

    def ask(*args: Any) -> None:
        raise Asked(uri(*args))

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: empty(*size, **o))
    monkeypatch.setattr(flashinfer.prefill, "gen_batch_prefill_module", ask)
    pool = make_pool(module, 16, 8, torch.device("cpu"))
    limits = StepLimits(NUM_ROWS, 1200, MAX_LEN, 16)
    for kind in STEPS:
        attention = FlashInferAttention(pool, 8, 2**27)
        tensors = StepTensors(limits, pool.device, spare_page=pool.num_pages)
        attention.read_from(tensors)
        batch = make_batch(kind, np.random.default_rng(0))
        step = StepBuffer(limits, tensors).send(batch, SHAPES.get(kind))
        with pytest.raises(Asked) as asked:
            (attention.plan_for_graph if kind in SHAPES else attention.plan)(step)
        assert str(asked.value) == name, kind


@pytest.mark.parametrize("decode", build_flashinfer.CHECKED_DECODES, ids=str)
def test_decode_kernels_ask_for_the_modules_that_are_built(
    decode: build_flashinfer.Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine and the script call the same function of FlashInfer with the same arguments."""
    flashinfer = pytest.importorskip("flashinfer")
    xqa = importlib.import_module("flashinfer.xqa")  # the attribute is a function
    name = "gen_xqa_module" if decode.kernel == "xqa" else "gen_batch_decode_module"
    users = [flashinfer.jit, flashinfer.decode]
    if decode.kernel == "xqa":
        users = [importlib.import_module("flashinfer.jit.xqa"), xqa]
    signature = inspect.signature(getattr(users[0], name))

    def ask(*args: Any) -> None:
        given = signature.bind(*args)
        given.apply_defaults()
        raise Asked(str(given.arguments))

    for module in users:
        monkeypatch.setattr(module, name, ask)
    monkeypatch.setattr(xqa, "get_device_sm_count", lambda device: 132)
    monkeypatch.setattr(xqa, "get_compute_capability", lambda device: (9, 0))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **o: empty(*size, **o))
    num_heads = 2 * (decode.group or 4)
    pool = make_pool(decode.attention, decode.page_size, num_heads, torch.device("cpu"))
    limits = StepLimits(NUM_ROWS, 1200, MAX_LEN, decode.page_size)
    attention = FlashInferAttention(pool, num_heads, 2**27, decode.kernel)
    tensors = StepTensors(limits, pool.device, spare_page=pool.num_pages)
    attention.read_from(tensors)
    step = StepBuffer(limits, tensors).send(make_batch("decode", np.random.default_rng(0)))
    qkv = torch.empty(step.num_tokens, num_heads + 4, 128, dtype=pool.dtype)

    def attend() -> None:
        attention.plan(step)
        attention.begin()
        attention.forward(*qkv.split_with_sizes((num_heads, 2, 2), 1), 1)

    with pytest.raises(Asked) as by_engine:
        attend()
    with pytest.raises(Asked) as by_script:
        build_flashinfer.decode_spec(decode)
    assert str(by_engine.value) == str(by_script.value)


@pytest.fixture
def prebuilt(tmp_path: Path) -> Path:
    (tmp_path / build_flashinfer.MADE_FOR).write_text(json.dumps(build_flashinfer.made_for()))
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm/norm.so").write_bytes(b"compiled")
    return tmp_path


def test_compiled_modules_are_used_only_where_they_suit(prebuilt: Path) -> None:
    pytest.importorskip("flashinfer")
    unsuitable = build_flashinfer.unsuitable
    assert unsuitable(prebuilt, (9, 0)) is None
    assert unsuitable(prebuilt, (8, 0)) == "the compiled modules are for 9.0a; this GPU is 8.0"
    assert unsuitable(prebuilt / "norm", (9, 0)) is not None
    other = build_flashinfer.made_for() | {"flashinfer-python": "0.0.1"}
    (prebuilt / build_flashinfer.MADE_FOR).write_text(json.dumps(other))
    assert "flashinfer-python 0.0.1 instead of" in (unsuitable(prebuilt, (9, 0)) or "")


def test_flashinfer_takes_a_compiled_module_without_a_compiler(
    prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flashinfer")
    from flashinfer.jit import core, env

    monkeypatch.setattr(core.current_compilation_context, "TARGET_CUDA_ARCHS", {(9, "0a")})
    monkeypatch.setattr(env, "FLASHINFER_GEN_SRC_DIR", prebuilt)
    monkeypatch.setattr(env, "FLASHINFER_AOT_DIR", prebuilt / "aot")
    specs = build_flashinfer.module_specs([])
    assert [spec.is_aot for spec in specs] == [False, False]
    assert build_flashinfer.install(prebuilt, specs) == 1
    assert [spec.is_aot for spec in specs] == [True, False]
    assert specs[0].get_library_path().read_bytes() == b"compiled"
