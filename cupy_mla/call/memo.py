"""What was worked out for calls before, kept for those that come again; bounded, and forgotten all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])

_forgetters: list[Callable[[], None]] = []


class Memo(dict[Key, Value]):
    """A dictionary that is emptied when it is full: what a program needs all the time is soon in it again.

    Parameters
    ----------
    most
        How many entries it may have.
    """

    def __init__(self, most: int) -> None:
        self.most = most

    def keep(self, key: Key, value: Value) -> Value:
        """Add an entry."""
        if len(self) >= self.most:
            self.clear()
        self[key] = value
        return value


def shared_memo(most: int) -> Memo[Any, Any]:
    """A memo that `forget` empties."""
    memo: Memo[Any, Any] = Memo(most)
    _forgetters.append(memo.clear)
    return memo


def remembered(most: int) -> Callable[[Function], Function]:
    """Remember the results of a function of hashable arguments, those used last; `forget` drops them."""

    def decorate(function: Function) -> Function:
        cached = functools.lru_cache(maxsize=most)(function)
        _forgetters.append(cached.cache_clear)
        return cached  # type: ignore[return-value]

    return decorate


def on_forget(function: Callable[[], None]) -> Callable[[], None]:
    """Have `forget` call a function too, of a module that remembers in a way of its own."""
    _forgetters.append(function)
    return function


def forget() -> None:
    """Drop all that was remembered of calls, e.g. where a test has taken the GPU away."""
    for empty in _forgetters:
        empty()
