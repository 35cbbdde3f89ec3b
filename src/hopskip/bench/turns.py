"""Contenders take turns (A B C, A B C, ..), so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from statistics import median
from typing import TypeVar

Item = TypeVar("Item")
T = TypeVar("T")


def take_turns(contenders: Mapping[str, Callable[[Item], T]], items: Iterable[Item]) -> dict[str, list[T]]:
    """What each contender gives for each item: all of them have the first item, then all the second, ..

    >>> take_turns({"a": lambda n: n + 1, "b": lambda n: -n}, [1, 2])
    {'a': [2, 3], 'b': [-1, -2]}
    """
    found: dict[str, list[T]] = {name: [] for name in contenders}
    for item in items:
        for name, run in contenders.items():
            found[name].append(run(item))
    return found


def medians(found: Mapping[str, Seq[float]]) -> dict[str, float]:
    """The middle of each contender's runs.

    >>> medians({"a": [1.0, 5.0, 2.0]})
    {'a': 2.0}
    """
    return {name: median(values) for name, values in found.items()}
