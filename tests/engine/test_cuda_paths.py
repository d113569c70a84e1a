"""The CUDA toolkit and the driver are found in folder trees as machines have them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisrv.engine.cuda_paths import CudaPaths, find_cuda

FLAGS = "FLASHINFER_EXTRA_LDFLAGS"
HEADERS = ("cublasLt.h", "cublas_v2.h", "curand_kernel.h")


def make(*files: Path) -> None:
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.chmod(0o755)


def make_toolkit(home: Path, libraries: str = "lib64") -> Path:
    make(home / "bin/nvcc", home / libraries / "libcudart.so")
    make(*(home / "include" / name for name in HEADERS))
    return home


def test_a_wrapper_script_is_not_taken_for_the_toolkit(tmp_path: Path) -> None:
    wrapper = tmp_path / "usr/local/bin/nvcc"
    make(wrapper)
    toolkit = make_toolkit(tmp_path / "usr/local/cuda-13.0")
    found = find_cuda({"PATH": str(wrapper.parent)}, tmp_path)
    assert (found.toolkit, found.libraries) == (toolkit, toolkit / "lib64")


def test_the_nvcc_on_the_path_comes_before_other_toolkits(tmp_path: Path) -> None:
    make_toolkit(tmp_path / "usr/local/cuda-13.0")
    toolkit = make_toolkit(tmp_path / "opt/cuda-12.9")
    assert find_cuda({"PATH": str(toolkit / "bin")}, tmp_path).toolkit == toolkit
    link = tmp_path / "bin/nvcc"
    link.parent.mkdir()
    link.symlink_to(toolkit / "bin/nvcc")
    assert find_cuda({"PATH": str(link.parent)}, tmp_path).toolkit == toolkit


def test_libraries_that_are_not_in_lib64_are_given_to_the_linker(tmp_path: Path) -> None:
    libraries = "targets/x86_64-linux/lib"
    toolkit = make_toolkit(tmp_path / "usr/local/cuda", libraries)
    found = find_cuda({}, tmp_path)
    assert found.variables(tmp_path / "stubs", {}) == {
        "CUDA_HOME": str(toolkit),
        FLAGS: f"-L{toolkit / libraries}",
    }


def test_headers_that_flashinfer_only_includes_may_be_empty(tmp_path: Path) -> None:
    toolkit = make_toolkit(tmp_path / "usr/local/cuda")
    (toolkit / "include/cublasLt.h").unlink()
    stubs = tmp_path / "stubs"
    found = find_cuda({}, tmp_path).variables(stubs, {"FLASHINFER_EXTRA_CUDAFLAGS": "-DA"})
    assert found["FLASHINFER_EXTRA_CUDAFLAGS"] == f"-DA -I{stubs}"
    assert sorted(path.name for path in stubs.iterdir()) == ["cublasLt.h"]


@pytest.mark.parametrize("where", ["usr/lib/x86_64-linux-gnu", "usr/local/nvidia/lib64"])
def test_a_driver_without_the_name_that_the_linker_looks_for_gets_a_link(
    tmp_path: Path, where: str
) -> None:
    driver = tmp_path / where / "libcuda.so.1"
    make(driver)
    found, stubs = find_cuda({}, tmp_path), tmp_path / "stubs"
    assert found.driver == driver.parent
    for _ in range(2):  # the link may exist already
        variables = found.variables(stubs, {FLAGS: "-L/mine -lmine"})
        assert variables == {FLAGS: f"-L/mine -lmine -L{stubs}"}
        assert (stubs / "libcuda.so").resolve() == driver
    again = found.variables(stubs, variables)
    assert again == variables
    make(driver.parent / "libcuda.so")
    assert found.variables(stubs, {}) == {FLAGS: f"-L{driver.parent}"}


def test_the_library_that_is_loaded_comes_before_all_others(tmp_path: Path) -> None:
    loaded, listed = tmp_path / "driver/580", tmp_path / "listed"
    make(loaded / "libcuda.so.1", listed / "libcuda.so.1")
    environment = {"LD_LIBRARY_PATH": f":{tmp_path / 'none'}:{listed}"}
    assert find_cuda(environment, tmp_path).driver == listed
    maps = tmp_path / "proc/self/maps"
    make(maps)
    maps.write_text(f"7f00-7f01 r--p 00000000 00:01 42   {loaded}/libcuda.so.580.1\n")
    assert find_cuda(environment, tmp_path).driver == loaded


def test_what_is_missing_is_said_in_one_sentence_each(tmp_path: Path) -> None:
    none = find_cuda({"PATH": ""}, tmp_path)
    assert none == CudaPaths(None, None, None)
    assert [sentence.split(";")[1] for sentence in none.missing()] == [
        " set CUDA_HOME",
        " add its folder to LD_LIBRARY_PATH",
    ]
    assert none.variables(tmp_path / "stubs", {}) == {}
    toolkit = make_toolkit(tmp_path / "usr/local/cuda")
    make(tmp_path / "usr/lib64/libcuda.so.1")
    assert find_cuda({}, tmp_path).missing() == []
    make(tmp_path / "chosen/bin/nvcc")  # has no libraries, but somebody has chosen it
    chosen = find_cuda({"CUDA_HOME": str(tmp_path / "chosen"), "PATH": str(toolkit / "bin")})
    assert chosen.toolkit is None


def test_they_are_set_before_flashinfer_is_imported(tmp_path: Path) -> None:
    """In a process of its own, because only the first import counts."""
    pytest.importorskip("flashinfer")
    toolkit = make_toolkit(tmp_path / "cuda", "targets/x86_64-linux/lib")
    (toolkit / "bin/nvcc").write_text("#!/bin/sh\necho release 13.0,\n")
    make(tmp_path / "driver/libcuda.so.1")
    code = (
        "from minisrv.engine.flashinfer_library import import_flashinfer\n"
        "import_flashinfer()\n"
        "from flashinfer.jit.cpp_ext import generate_ninja_build_for_op\n"
        "print(generate_ninja_build_for_op('m', [], None, None, None, None))"
    )
    environment = {
        **{name: value for name, value in os.environ.items() if name != "CUDA_HOME"},
        "PATH": f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(tmp_path / "driver"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"cuda_home = {toolkit}\n" in done.stdout
    assert f"-L{toolkit / 'targets/x86_64-linux/lib'}" in done.stdout
    assert f"-L{tmp_path / '.cache/minisrv/cuda'}" in done.stdout
