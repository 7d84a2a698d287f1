"""Modules that are functions of the library too.

`from raysft import train` is to give a function, and Python gives the package raysft.train, as soon
as anything has imported it. So these few modules can be called, which calls the function of
`raysft.library` that has their name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType


class _Offered(ModuleType):
    def __call__(self, *args: object, **kwargs: object) -> object:
        function = getattr(import_module("raysft.library"), self.__name__.rpartition(".")[2])
        return function(*args, **kwargs)


def callable_too(name: str) -> None:
    """Make the module of this name, which is being imported, one that can be called."""
    sys.modules[name].__class__ = _Offered
