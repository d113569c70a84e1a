"""Each variant of a Triton kernel that a model launches, compiled for a Hopper GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_dry_run.dry_run import dry_run
from tests.gpu_dry_run.models import MODELS
from tests.gpu_dry_run.requests import SMALL, of_every_kind

EXPECTED = {"_write_pages", "_expand", "_norm_rotate_store", "_score_blocks", "_pick_best"}


def compile_variants(name: str, folder: Path) -> None:
    from tests.gpu_dry_run.fake_triton import SHARED_BYTES

    with dry_run(MODELS[name], folder, **SMALL) as run:
        run.serve(of_every_kind())
        variants = list(run.machine.kernels.variants)
    assert {variant.name for variant in variants} >= EXPECTED
    for variant in variants:
        built = variant.compile()
        assert ".target sm_90" in built.asm["ptx"], variant.describe()
        assert built.asm["cubin"], variant.describe()
        assert built.metadata.shared <= SHARED_BYTES, variant.describe()


def test_the_variants_of_a_small_model_compile(tmp_path: Path) -> None:
    compile_variants("Qwen3-0.6B", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", MODELS)
def test_the_variants_of_all_models_compile(name: str, tmp_path: Path) -> None:
    compile_variants(name, tmp_path)
