"""A cache for threads at once that holds so many entries, and gives up the oldest for a new one."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    def __init__(self, most: int) -> None:
        self._entries: dict[Hashable, Value] = {}
        self._most, self._lock = most, threading.Lock()
        # a dict's own get, which needs no lock: a call of a layer asks it
        self.get = self._entries.get

    def put(self, key: Hashable, value: Value) -> Value:
        """What is under the key from now on: of two threads that made a value, both take the first."""
        with self._lock:
            while len(self._entries) >= self._most:
                del self._entries[next(iter(self._entries))]
            return self._entries.setdefault(key, value)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
