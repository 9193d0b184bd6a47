"""How well a model does on benchmarks, by EleutherAI's evaluation harness."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Imports the harness when it is asked for: it takes seconds, and those who read results do without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module("cheaper.evaluation.evaluator"), name)
