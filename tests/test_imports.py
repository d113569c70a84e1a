"""The layers of the package: imports point downward, and the light processes stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "minisrv"
LAYERS = [
    {"terminal_line"},
    {"errors", "log"},
    {"sampling_params", "restart_limit", "option_values", "start_progress", "user_cache"}
    | {"server_request"},
    {"config", "checkpoint"},
    {"command_line", "wire", "bench"},
    {"supervision"},
    {"kvcache", "structured_output", "engine", "routing"},
    {"frontend", "tokenizer", "scheduler", "detokenizer", "kv_events"},
    {"console", "frontend_manager", "llm", "simulation"},
    {"launch_server"},
    {"asgi", "ray"},
    {"commands"},
    {"__main__"},
]
# Inside the frontend, in the same order.
FRONTEND_LAYERS = [
    {"tool_calls"},
    {"fields"},
    {"registry"},
    {"http"},
    {"generation"},
    {"ops"},
    {"apis"},
    {"drain"},
    {"app"},
    {"process"},
    {"__main__"},
]
LIGHT = [
    "minisrv",
    "minisrv.frontend.process",
    "minisrv.tokenizer.process",
    "minisrv.detokenizer.process",
    "minisrv.kv_events.process",
    "minisrv.supervision.supervisor",
    "minisrv.launch_server",
    "minisrv.asgi",
    "minisrv.commands.plan",
    "minisrv.commands.simulate",
    "minisrv.commands.bench",
    "minisrv.scheduler.scheduler",
    "minisrv.structured_output.compiler",
    "minisrv.structured_output.checker",
]
PURE = [
    "bench/reply.py",
    "bench/prompts.py",
    "bench/workloads.py",
    "scheduler/scheduler.py",
    "scheduler/waiting_queue.py",
    "scheduler/fair_shares.py",
    "scheduler/request.py",
    "scheduler/step_plan.py",
    "structured_output/matcher.py",
    "kvcache/page_pool.py",
    "kvcache/radix_tree.py",
    "kvcache/manager.py",
    "kvcache/tree_changes.py",
    "routing/router.py",
    "routing/prefix_index.py",
    "detokenizer/incremental.py",
    "detokenizer/stop_strings.py",
    "detokenizer/reasoning.py",
    "frontend/generation/event_reader.py",
    "frontend/apis/responses/conversation.py",
    "frontend/apis/responses/output_items.py",
    "frontend/generation/event_reader.py",
    "frontend/apis/anthropic/blocks.py",
    "frontend/tool_calls/parser.py",
]


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(
    ("package", "layers"), [("minisrv", LAYERS), ("minisrv.frontend", FRONTEND_LAYERS)]
)
def test_imports_point_downward(package: str, layers: list[set[str]]) -> None:
    """Between the rooms of a package; so there is no circle between them either."""
    level = {name: i for i, names in enumerate(layers) for name in names}
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    upward, unknown = [], set()
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).with_suffix("").parts[0]
        if room == "__init__":
            continue
        if room not in level:
            unknown.add(room)
            continue
        for module in imported_modules(path):
            if not module.startswith(f"{package}."):
                continue
            other = module.removeprefix(f"{package}.").split(".")[0]
            if other in level and other != room and level[other] >= level[room]:
                upward.append(f"{path.relative_to(folder)} imports {module}")
    assert not unknown, "rooms without a layer"
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_neither_torch_nor_transformers(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "sys.exit(','.join({'torch', 'transformers'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PURE)
def test_policy_does_no_io(name: str) -> None:
    roots = {module.split(".")[0] for module in imported_modules(PACKAGE / name)}
    assert not roots & {"zmq", "asyncio", "torch", "time", "socket", "threading"}
