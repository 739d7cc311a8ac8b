"""Stands in for torchvision, whose wheel needs a torch with CUDA; SGLang imports it for images."""

import enum
import importlib
from typing import Any

import placeholders

__version__ = "0.28.0"
placeholders.install(__name__)


class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


for _name in ("io", "ops", "transforms", "transforms.functional", "transforms.v2"):
    importlib.import_module(f"{__name__}.{_name}")
for _name in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional"):
    vars(importlib.import_module(f"{__name__}.{_name}"))["InterpolationMode"] = InterpolationMode


def __getattr__(name: str) -> Any:
    return placeholders.attribute(__name__, name)
