"""Packages that are called like the function they are about: ``cloob.train(config)`` and ``cloob.evaluate(models)``.

Importing ``cloob.train.loop`` makes ``cloob.train`` the package, whatever that name stood for: so the package is what
the name stands for, and the function is what it does when it is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package with ``function_home``, the module that holds a function of the package's own name."""

    function_home: str

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function, imported when it is first asked for; ``inspect.signature`` looks here."""
        function: Callable[..., Any] = getattr(
            importlib.import_module(self.function_home), self.__name__.rpartition(".")[2]
        )
        return function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Calls the function."""
        return self.__wrapped__(*arguments, **options)


def make_callable(package: str, function_home: str) -> None:
    """Makes a package, while it is imported, one that is called like the function of its name in ``function_home``."""
    module = sys.modules[package]
    module.__class__ = CallablePackage
    vars(module)["function_home"] = function_home
