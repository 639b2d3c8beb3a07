"""Regular expressions for the names of modules. They come with adapters, from strangers, so their time is bounded."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import regex

T = TypeVar("T")

# compiling can't be stopped, and writes out what is counted
_LONGEST = 1 << 16
_LONGEST_WRITTEN_OUT = 1 << 18
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
# of the package `regex` alone: recursion, whose stack no time bounds, and fuzzy matching
_FOREIGN = re.compile(r"\(\?(?:[R0-9&]|P>)|\{(?!\d{0,5},?\d{0,5}\})")


class Budget:
    """The time that all patterns of an adapter may take together; honest ones take milliseconds."""

    seconds = 10.0

    def __init__(self) -> None:
        self.left = self.seconds

    def run(self, pattern: str, action: Callable[[float], T]) -> T:
        """What ``action`` returns, which is told the seconds that are left, and raises TimeoutError after them."""
        start = time.perf_counter()
        try:
            if self.left > 0:
                return action(self.left)
        except TimeoutError:
            pass
        finally:
            self.left -= time.perf_counter() - start
        raise ValueError(f"patterns must be matched in {self.seconds:g} s, all together, got {pattern!r:.200}")


def matcher(pattern: str, budget: Budget, *, ends: bool = False) -> Callable[[str], bool]:
    """Whether the pattern matches the whole of a name, with ``re``'s meaning, "." being any character.

    ends: or what follows one of its dots.

    Raises:
        ValueError: it is no regular expression, or too large a one; by what it returns too, once the time is up.
    """
    fullmatch = _compiled(pattern, rf"(?:.*\.)?(?:{pattern})" if ends else pattern, budget)
    return lambda name: fullmatch(name) is not None


def numbered(lists: Sequence[str], budget: Budget) -> Callable[[str], int | None]:
    """The number of a layer in a list of layers, read from a path, by PEFT's rule: the first that follows one of the
    patterns ``lists``, or without patterns the first at all that is inside something.

    Raises:
        ValueError: as :func:`matcher`.
    """
    end = r"\.(?P<number_of_layer>\d+)\..*"
    rules = {pattern: rf"(?:^|.*?\.){pattern}{end}" for pattern in lists} or {"": rf".*?\.[^.]*{end}"}
    try:
        searches = [_compiled(pattern, rule, budget) for pattern, rule in rules.items()]
    except ValueError as error:
        raise ValueError(f"layers_pattern {error}") from None

    def number(path: str) -> int | None:
        found = next((match for search in searches if (match := search(path))), None)
        return None if found is None or found["number_of_layer"] is None else int(found["number_of_layer"])

    return number


def _compiled(pattern: str, rule: str, budget: Budget) -> Callable[[str], Any]:
    """The match of a whole name with ``rule``, which has ``pattern`` in it, or None."""
    try:
        _check(pattern)
        # re is quick, and needs no clock where it has nothing to go back to
        simple = not any(character in pattern for character in "*+?{|(")
        engine: Any = re if simple else regex
        # alone, too: what stands around it could make sense of a stray bracket
        compiled = budget.run(pattern, lambda _: engine.compile(pattern, re.DOTALL))
        if rule != pattern:
            compiled = budget.run(pattern, lambda _: engine.compile(rule, re.DOTALL))
    except (re.error, regex.error, TypeError, OverflowError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"must hold regular expressions, got {pattern!r:.200}: {why}") from None
    if simple:
        return lambda name: budget.run(pattern, lambda _: compiled.fullmatch(name))
    return lambda name: budget.run(pattern, lambda left: compiled.fullmatch(name, timeout=left))


def _check(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise TypeError("it is no str")
    if len(pattern) > _LONGEST:
        raise OverflowError(f"it has more than {_LONGEST:,} characters")
    if found := _FOREIGN.search(pattern):
        raise re.error(f"{found[0]!r} is none of Python's", pattern, found.start())
    copies = math.prod(max(int(n or 1) for n in counts) or 1 for counts in _COUNT.findall(pattern))
    if copies * len(pattern) > _LONGEST_WRITTEN_OUT:
        raise OverflowError(f"its counts make it longer than {_LONGEST_WRITTEN_OUT:,} characters")
