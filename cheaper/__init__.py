"""MobileLLM-R1's training recipe on MosaicML Composer: from raw text to a reasoning model, on a laptop or a cluster.

What a program needs of it::

    from cheaper import build_trainer, evaluate, generate, load_config, load_model
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each is; imported when it is asked for, since PyTorch and Composer take seconds.
_PUBLIC = {
    "build_trainer": "cheaper.training",
    "evaluate": "cheaper.evaluation",
    "generate": "cheaper.language_model",
    "load_config": "cheaper.compose",
    "load_model": "cheaper.language_model",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
