"""Regular expressions that match whole names in bounded time: they come with adapters, from strangers.

``re`` backtracks: ``(a+)+$`` takes it time exponential in the name. Here all the positions that a pattern can have
reached are followed at once, and what one name may cost is bounded. Single characters and anchors are ``re``'s own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

if sys.version_info >= (3, 11):
    from re import _compiler, _parser  # type: ignore[attr-defined]
else:
    import sre_compile as _compiler
    import sre_parse as _parser

# steps that may be taken for one name, and for all names together; honest patterns take some hundreds a name
_LARGEST_COST = 20_000
_LARGEST_TOTAL = 30_000_000
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")


class Budget:
    """The steps that several patterns may take together."""

    def __init__(self) -> None:
        self.left = _LARGEST_TOTAL


class _TooCostlyError(Exception):
    pass


class _Name:
    """One name that is being matched. A set of positions is an int: bit i stands for the position before name[i]."""

    def __init__(self, name: str, budget: Budget) -> None:
        self.name, self.budget = name, budget
        self.last = budget.left - _LARGEST_COST
        self._where: dict[re.Pattern[str], int] = {}

    def spend(self) -> None:
        self.budget.left -= 1
        if self.budget.left < max(self.last, 0):
            raise _TooCostlyError

    def where(self, leaf: re.Pattern[str]) -> int:
        """The positions at which one character's pattern, or an anchor, matches."""
        if leaf not in self._where:
            self._where[leaf] = sum(1 << found.start() for found in leaf.finditer(self.name))
        return self._where[leaf]


# the positions reached, from those that it starts at
_Node = Callable[[_Name, int], int]


def matcher(pattern: str, budget: Budget, *, ends: bool = False) -> Callable[[str], bool]:
    """Whether the pattern matches the whole of a name, with ``re``'s meaning, "." being any character.

    ends: or what follows one of its dots, as if the pattern were ``(.*\\.)?(pattern)``.

    Raises:
        ValueError: it is no regular expression, or has what can't be matched in bounded time (references to groups,
            conditions, atomic groups, flags for a part); by what it returns, where a name would take too long.
    """
    try:
        node = None if _is_simple(pattern) else _sequence(_parser.parse(pattern, re.DOTALL))
        if ends:
            whole = rf"(.*\.)?({pattern})"
            node = node and _sequence(_parser.parse(whole, re.DOTALL))
        else:
            whole = pattern
        if node is None:
            # the pattern alone, too: what stands around it could make sense of a stray bracket
            re.compile(pattern)
            simple = re.compile(whole, re.DOTALL)
            return lambda name: simple.fullmatch(name) is not None
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"must hold regular expressions, got {_shown(pattern)}: {why}") from None
    followed = node

    def matches(name: str) -> bool:
        try:
            return bool(followed(_Name(name, budget), 1) >> len(name) & 1)
        except RecursionError:
            raise ValueError(f"pattern must not nest so deeply, got {_shown(pattern)}") from None
        except _TooCostlyError:
            raise ValueError(
                f"pattern must be matched in {_LARGEST_COST:,} steps a name, {_LARGEST_TOTAL:,} in all, "
                f"got {_shown(pattern)} for {name!r}"
            ) from None

    return matches


def _is_simple(pattern: object) -> bool:
    """Whether ``re`` has nothing to go back to: no repeats, no choices, no groups."""
    return isinstance(pattern, str) and not any(character in pattern for character in "*+?{|(")


def _shown(pattern: object) -> str:
    shown = repr(pattern)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _sequence(tree: Any) -> _Node:
    nodes = [_node(tree.state, item) for item in tree]

    def run(name: _Name, at: int) -> int:
        for node in nodes:
            if not at:
                break
            name.spend()
            at = node(name, at)
        return at

    return run


def _node(state: Any, item: tuple[Any, Any]) -> _Node:
    kind, value = str(item[0]), item[1]
    if kind in _CHARACTERS or kind == "AT":
        leaf = _compiler.compile(_parser.SubPattern(state, [item]))
        if kind == "AT":
            return lambda name, at: at & name.where(leaf)
        return lambda name, at: (at & name.where(leaf)) << 1
    if kind == "SUBPATTERN" and not value[1] and not value[2]:
        return _sequence(value[3])
    if kind == "BRANCH":
        return _branch([_sequence(tree) for tree in value[1]])
    if kind in ("MAX_REPEAT", "MIN_REPEAT"):
        return _repeat(int(value[0]), int(value[1]), _sequence(value[2]))
    if kind in ("ASSERT", "ASSERT_NOT"):
        behind, tree = value[0] < 0, value[1]
        return _look(_sequence(tree), tree.getwidth()[0] if behind else None, kind == "ASSERT")
    raise re.error(f"{kind.lower().replace('_', ' ')} can't be matched in bounded time")


def _branch(nodes: Iterable[_Node]) -> _Node:
    def run(name: _Name, at: int) -> int:
        reached = 0
        for node in nodes:
            reached |= node(name, at)
        return reached

    return run


def _repeat(least: int, most: int, body: _Node) -> _Node:
    def run(name: _Name, at: int) -> int:
        # a longer way than the name goes nowhere in some round, so more rounds, or fewer, reach the same
        for _ in range(min(least, len(name.name) + 1)):
            if not at:
                return 0
            name.spend()
            at = body(name, at)
        reached, rounds = at, most - least
        while at and rounds:
            name.spend()
            at = body(name, at) & ~reached
            reached |= at
            rounds -= 1
        return reached

    return run


def _look(body: _Node, width: int | None, wanted: bool) -> _Node:
    """width: of what must stand before a position; None looks at what follows it."""

    def seen(name: _Name, position: int) -> bool:
        if width is None:
            return body(name, 1 << position) != 0
        return position >= width and bool(body(name, 1 << (position - width)) >> position & 1)

    def run(name: _Name, at: int) -> int:
        return sum(1 << p for p in range(at.bit_length()) if at >> p & 1 and seen(name, p) == wanted)

    return run
