"""How many pages the KV cache gets, and the memory plan as a table. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minisrv.config import ServerConfig
from minisrv.errors import ConfigError
from minisrv.option_values import flag, parse_size

_CPU_SHARE = 0.25
_CPU_LIMIT = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes on one rank; 0 if unknown. `token_counts` is what penalties need,
    `workspace` what the largest step allocates, `context` what the driver takes. `left` is what
    nothing has taken, None if that is not known. `notes` adds text to rows of the table, by row
    name.
    """

    weights: int
    token_counts: int
    workspace: int
    num_pages: int
    page_bytes: int
    page_size: int
    max_seq_len: int
    graphs: int = 0
    context: int = 0
    left: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.num_pages * self.page_size

    def describe(self) -> str:
        """A table with one row per use of memory, then how many full requests the cache holds."""
        sizes = {
            "weights": self.weights,
            "token counts": self.token_counts,
            "workspace": self.workspace,
            "CUDA graphs": self.graphs,
            "CUDA context": self.context,
            "KV cache": self.num_pages * self.page_bytes,
        }
        notes = {"KV cache": self._cache_note(), **self.notes}
        lines = [
            f"{name:<13}{format_size(size):>10}  {notes.get(name, '')}".rstrip()
            for name, size in sizes.items()
            if size or name in ("weights", "KV cache")
        ]
        requests = self.num_tokens / self.max_seq_len
        room = f"room for {requests:.1f} requests of the full context of {self.max_seq_len}"
        lines.append(f"{'':<25}{room}")
        if self.left is not None:
            lines.append(f"{'left':<13}{format_size(self.left):>10}")
        return "\n".join(lines)

    def _cache_note(self) -> str:
        return f"{self.num_pages} pages of {self.page_size} tokens, {self.num_tokens} tokens"


def format_size(size: int) -> str:
    """Bytes in the largest unit in which the value is at least 1, such as 1.5 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def choose_num_pages(
    config: ServerConfig, *, page_bytes: int, max_seq_len: int, free_bytes: int, why: str
) -> int:
    """--num-pages if given; otherwise what fits in `free_bytes`, at most `useful_pages`.

    why: where `free_bytes` comes from. Raises ConfigError if not even one page fits.
    """
    if config.num_pages is not None:
        return config.num_pages
    num_pages = min(free_bytes // page_bytes, useful_pages(config, max_seq_len))
    if num_pages < 1:
        option = "kv_memory" if config.device != "cuda" else "memory_fraction"
        raise ConfigError(
            f"a page of {config.page_size} tokens takes {format_size(page_bytes)}, but the KV "
            f"cache has only {format_size(max(0, free_bytes))} ({why}); raise {flag(option)} or "
            f"lower {flag('page_size')}"
        )
    return num_pages


def useful_pages(config: ServerConfig, max_seq_len: int) -> int:
    """Pages that --max-running-requests requests of full length fill."""
    return config.max_running_requests * -(-max_seq_len // config.page_size)


def cpu_cache_bytes(config: ServerConfig) -> tuple[int, str]:
    """Bytes of one rank's KV cache on a CPU; and an explanation."""
    if config.kv_memory is not None:
        total = parse_size(config.kv_memory)
        return total // config.tp, f"{flag('kv_memory')} {config.kv_memory}"
    total = min(_CPU_LIMIT, int(available_memory() * _CPU_SHARE))
    return (
        total // config.tp,
        "a quarter of the available memory, at most 4 GiB, for all ranks together",
    )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be allocated without swapping, as the kernel estimates them.

    Half of the physical memory on systems without such an estimate (macOS).
    """
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024  # "kB" means KiB there
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
