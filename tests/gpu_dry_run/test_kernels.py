"""Each variant of a Triton kernel that a model launches, compiled for a Hopper GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gpu_dry_run.dry_run import dry_run
from tests.gpu_dry_run.models import MODELS
from tests.gpu_dry_run.requests import SMALL, of_every_kind

EXPECTED = {"_write_pages", "_expand", "_norm_rotate_store", "_score_blocks", "_pick_best"}
JOINED = {"_project_heads", "_add_product"}
DENSE = {"_gate_and_up"}
SPARSE = {"_multiply_router", "_choose_experts", "_gate_and_up_of_experts", "_add_experts"}
# What reads or writes memory that other kernels have written, or that they read.
_ACCESS = re.compile(r"\b(ld|st|atom|red|cp\.async|cp\.async\.bulk)\S*\.global")


def compile_variants(name: str, folder: Path) -> None:
    from tests.gpu_dry_run.fake_triton import SHARED_BYTES

    with dry_run(MODELS[name], folder, **SMALL) as run:
        run.serve(of_every_kind())
        variants = list(run.machine.kernels.variants)
    names = {variant.name for variant in variants}
    switches = MODELS[name].options
    assert names >= EXPECTED
    joined = JOINED | (SPARSE if "30B-A3B" in name else DENSE)
    assert names & (JOINED | DENSE | SPARSE) == (
        joined if switches.get("joined_kernels") else set()
    )
    for variant in variants:
        assert variant.options.launch_pdl == bool(switches.get("programmatic_launch"))
        built = variant.compile()
        assert ".target sm_90" in built.asm["ptx"], variant.describe()
        assert_waits_first(built.asm["ptx"], expected=variant.options.launch_pdl)
        assert built.asm["cubin"], variant.describe()
        assert built.metadata.shared <= SHARED_BYTES, variant.describe()


def assert_waits_first(ptx: str, *, expected: bool) -> None:
    """A program waits for the kernel before before it touches memory, and then starts the next."""
    wait, launch = ptx.find("griddepcontrol.wait"), ptx.find("griddepcontrol.launch_dependents")
    assert (wait >= 0) == (launch >= 0) == expected
    first = _ACCESS.search(ptx)
    assert first is not None
    if expected:
        assert wait < launch < first.start()


def test_the_variants_of_a_small_model_compile(tmp_path: Path) -> None:
    compile_variants("Qwen3-0.6B-switches", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_the_variants_of_all_models_compile(name: str, tmp_path: Path) -> None:
    compile_variants(name, tmp_path)
