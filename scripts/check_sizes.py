"""Report the sizes of modules and functions; fail where one of the package is over its limit.

`scripts/check_sizes.py [ROOT]`. Exceptions, each with its reason, are listed in pyproject.toml
under `[tool.check-sizes.exceptions]`; one that is not needed any more is a failure too.
"""

from __future__ import annotations

import ast
import statistics
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 60
PACKAGE = Path("python/minisrv")
OTHER_FOLDERS = ("tests", "scripts", "benchmark")

Sizes = dict[str, int]  # lines by `path` or `path:function`


def measure(root: Path, folder: Path) -> tuple[Sizes, Sizes]:
    """The modules and the functions below `folder`."""
    modules, functions = {}, {}
    for path in sorted((root / folder).rglob("*.py")):
        name, text = path.relative_to(root).as_posix(), path.read_text()
        modules[name] = text.count("\n")
        for function, num_lines in _functions(ast.parse(text), f"{name}:"):
            functions[function] = num_lines
    return modules, functions


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}."
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            assert child.end_lineno is not None
            yield name.removesuffix("."), child.end_lineno - child.lineno + 1
        yield from _functions(child, name)


def faults(modules: Sizes, functions: Sizes, exceptions: dict[str, str]) -> list[str]:
    """A sentence for each size over its limit and for each exception that is not needed."""
    limits = ((modules, MAX_MODULE_LINES), (functions, MAX_FUNCTION_LINES))
    too_long = {
        name: f"{name} has {num_lines} lines; the limit is {limit}"
        for sizes, limit in limits
        for name, num_lines in sizes.items()
        if num_lines > limit
    }
    unneeded = [f"{name} needs no exception" for name in exceptions.keys() - too_long.keys()]
    return [text for name, text in too_long.items() if name not in exceptions] + sorted(unneeded)


def report(title: str, modules: Sizes, functions: Sizes) -> None:
    """Print totals, and median, 90th percentile and maximum of each kind."""
    print(f"{title}: {len(modules)} modules, {sum(modules.values()):,} lines")
    for kind, sizes in (("module", modules), ("function", functions)):
        ordered = sorted(sizes, key=sizes.__getitem__)
        if ordered:
            median = statistics.median_low(sizes.values())
            p90, largest = ordered[len(ordered) * 9 // 10], ordered[-1]
            print(f"  {kind:<9}median {median}, p90 {sizes[p90]}, max {sizes[largest]} ({largest})")


def report_rooms(modules: Sizes) -> None:
    """Print the lines of each folder or file at the top of the package."""
    rooms: Counter[str] = Counter()
    for name, num_lines in modules.items():
        rooms[Path(name).relative_to(PACKAGE).parts[0]] += num_lines
    for room, num_lines in rooms.most_common():
        print(f"  {room:<24}{num_lines:>6,}")


def main(root: Path) -> int:
    """Print the report; exit status 1 if something is over its limit."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    exceptions = project["tool"]["check-sizes"]["exceptions"]
    modules, functions = measure(root, PACKAGE)
    report(str(PACKAGE), modules, functions)
    report_rooms(modules)
    for folder in OTHER_FOLDERS:
        report(folder, *measure(root, Path(folder)))
    found = faults(modules, functions, exceptions)
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent))
