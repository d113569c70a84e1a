"""Offline generation: the engine in this process."""

from minisrv.llm.offline import LLM

__all__ = ["LLM"]
