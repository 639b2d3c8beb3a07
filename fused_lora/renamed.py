"""Arguments that have another name now, or in other libraries."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """``@renamed(old="new")``: the function takes the keyword ``old`` too, for ``new``, with a DeprecationWarning."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{function.__name__} takes {new} or its old name {old}, got both")
                    warnings.warn(f"{old} is called {new} now", DeprecationWarning, stacklevel=2)
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def refused(**hints: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """``@refused(other="what to do")``: the error over a keyword that other libraries have says what does it here."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name in hints:
                    raise TypeError(f"{function.__name__} has no argument {name!r}; {hints[name]}")
            return function(*args, **kwargs)

        return call

    return decorate
