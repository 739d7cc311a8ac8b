"""Stands in for SGLang's CUDA kernels, which have no build for CPUs on PyPI."""

from typing import Any

import placeholders

__version__ = "0.4.10"
placeholders.install(__name__)


def __getattr__(name: str) -> Any:
    return placeholders.attribute(__name__, name)
