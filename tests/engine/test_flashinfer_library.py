"""FlashInfer is configured before it is imported, wherever that happens."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "python" / "minisrv"
LIBRARY = PACKAGE / "engine" / "flashinfer_library.py"


def test_its_norms_are_those_of_cuda(tmp_path: Path) -> None:
    """Whether they are is decided while it is imported."""
    (tmp_path / "flashinfer.py").write_text(
        "import os\nprint(os.environ['FLASHINFER_USE_CUDA_NORM'])\n"
    )
    code = (
        "import os, sys\n"
        "from minisrv.engine.flashinfer_library import import_flashinfer\n"
        "import_flashinfer()\n"
        "del sys.modules['flashinfer']\n"
        "os.environ['FLASHINFER_USE_CUDA_NORM'] = '0'\n"
        "import_flashinfer()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{PACKAGE.parent}"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("1\n0\n", "")


def test_nothing_else_imports_it() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "flashinfer" for name in names):
                importers.add(path)
    assert importers == {LIBRARY}
