"""The layers of the package: imports point downward, and the light processes stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "minisrv"
LAYERS = [
    {"errors", "log"},
    {"sampling_params", "scores"},
    {"config", "model_config", "messages", "cards", "chat_format"},
    {"child", "message_codec"},
    {"ipc", "metrics", "hf_tokenizer", "hub", "child_process"},
    {"kvcache", "structured_output", "engine"},
    {"frontend", "tokenizer", "scheduler", "detokenizer"},
    {"supervisor", "llm_outputs"},
    {"launch_server", "frontend_manager", "llm"},
    {"asgi", "batch", "plan"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LIGHT = [
    "minisrv",
    "minisrv.frontend.process",
    "minisrv.tokenizer.process",
    "minisrv.detokenizer.process",
    "minisrv.supervision.supervisor",
    "minisrv.launch_server",
    "minisrv.asgi",
    "minisrv.commands.plan",
    "minisrv.scheduler.scheduler",
    "minisrv.structured_output.compiler",
    "minisrv.structured_output.checker",
]
PURE = [
    "scheduler/scheduler.py",
    "scheduler/waiting_queue.py",
    "scheduler/request.py",
    "scheduler/step.py",
    "structured_output/matcher.py",
    "kvcache/page_pool.py",
    "kvcache/radix_tree.py",
    "kvcache/manager.py",
    "detokenizer/incremental.py",
    "detokenizer/stop_strings.py",
    "detokenizer/reasoning.py",
    "frontend/generation/assistant_message.py",
    "frontend/apis/responses/conversation.py",
    "frontend/apis/responses/output_items.py",
    "frontend/apis/openai/render.py",
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


def test_imports_point_downward() -> None:
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part == "__init__":
            continue
        for module in imported_modules(path):
            other = ([*module.split("."), ""])[1] if module.startswith("minisrv.") else ""
            if other in LEVEL and other != part and LEVEL[other] >= LEVEL[part]:
                upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
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
