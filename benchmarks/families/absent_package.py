"""Stand in for a package that vLLM imports and text does not need, where it is not installed.

served.py puts a copy of this file, under the package's name, on the path of vLLM's processes.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__path__: list[str] = []  # so that Python looks for modules below it
__version__ = "0"


class _AnyAttribute(type):
    """Class of a class that has every attribute."""

    def __getattr__(cls, name: str) -> type:
        return _attribute(name)


class Absent(metaclass=_AnyAttribute):
    """Stand in for whatever is imported."""


class AbsentModule(ModuleType):
    """Stand in for a module below the package."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        return _attribute(name)


class AbsentModules(MetaPathFinder, Loader):
    """Find every module below the package."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _attribute(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent


def __getattr__(name: str) -> type:
    return _attribute(name)


sys.meta_path.append(AbsentModules())
