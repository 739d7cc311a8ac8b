"""Packages that import but do nothing, for what SGLang imports and never calls on a CPU.

`install("name")` makes every submodule of `name` importable; each attribute of one is a placeholder
that can be named, compared and looked into, and raises when it is called, so that nothing that a
test depends on is ever faked in silence.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class Placeholder:
    """Something of a package that is not here."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError(f"{self.__name__} is a placeholder: it cannot be called")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placeholder) and other.__name__ == self.__name__

    def __hash__(self) -> int:
        return hash(self.__name__)

    def __repr__(self) -> str:
        return f"<placeholder {self.__name__}>"


def attribute(module: str, name: str) -> Any:
    """What `module.name` is: a class where the name looks like one, so that it can be a base."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (), {"__module__": module})
    return Placeholder(f"{module}.{name}")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        value = attribute(self.__name__, name)
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self._prefix = f"{package}."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(package: str) -> None:
    """Make any submodule of `package` importable."""
    sys.meta_path.append(_Finder(package))
