"""Runs a client as its user would: in a home directory of its own, without the test's variables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.clients.environments import Environment
from tests.support.server_process import PYTHONPATH

LIMIT_S = 180
SUFFIXES = {"python": "py", "js": "mjs", "sh": "sh"}


@dataclass
class Done:
    """How a program ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[Any]:
        """The lines of the output that are JSON objects."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines]

    def __str__(self) -> str:
        return f"status {self.status}\n{self.stdout}\n-- stderr --\n{self.stderr}"


@dataclass
class Machine:
    """A user's home directory with one client on the PATH, and `minisrv`."""

    environment: Environment
    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home, self.work = self.folder / "home", self.folder / "work"
        own_bin = self.folder / "bin"
        for folder in (self.home, self.work, own_bin):
            folder.mkdir(parents=True)
        command = own_bin / "minisrv"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH="{PYTHONPATH}" exec "{sys.executable}" -m minisrv "$@"\n'
        )
        command.chmod(0o755)
        path = [own_bin, self.environment.bin, self.environment.interpreter.parent]
        self.variables = {
            "PATH": os.pathsep.join([*map(str, path), "/usr/local/bin", "/usr/bin", "/bin"]),
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "HF_HUB_OFFLINE": "1",
            **self.variables,
        }

    def program(self, source: str, language: str, **variables: str) -> Done:
        """Run a source text in the client's interpreter, or in a shell."""
        path = self.work / f"program.{SUFFIXES[language]}"
        path.write_text(source)
        modules = self.work / "node_modules"
        if language == "js" and not modules.exists():
            modules.symlink_to(self.environment.folder / "node_modules")
        interpreter = ["sh", "-e"] if language == "sh" else [str(self.environment.interpreter)]
        return self.run([*interpreter, str(path)], **variables)

    def run(self, command: list[str], limit_s: float = LIMIT_S, **variables: str) -> Done:
        """Run a command in the folder of its work; fails if it does not end."""
        done = subprocess.run(
            command,
            cwd=self.work,
            env={**self.variables, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
        )
        return Done(done.returncode, done.stdout, done.stderr)
