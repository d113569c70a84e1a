"""Fixtures of this folder."""

from tests.support.model_dir import model_dir

__all__ = ["model_dir"]
