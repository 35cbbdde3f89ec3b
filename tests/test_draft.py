"""N-gram lookup, against a plain search."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hopskip.draft.ngram import NgramIndex


def plain_lookup(text: list[int], limit: int, min_size: int, max_size: int) -> list[int]:
    for size in range(max_size, min_size - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if len(text) > size and text[start : start + size] == text[-size:]:
                copied = list(text)
                position = start + size
                for i in range(limit):
                    copied.append(copied[position + i])
                return copied[len(text) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(1, 5)), st.integers(0, 6))
def test_lookup_equals_a_plain_search_as_the_text_grows(text: list[int], steps: list[int], limit: int) -> None:
    index = NgramIndex(min_size=2, max_size=4)
    length = 0
    for step in [*steps, len(text)]:
        length = min(len(text), length + step)
        assert index.propose(text[:length], limit) == plain_lookup(text[:length], limit, 2, 4)


def test_a_repeating_pattern_is_continued_beyond_its_end() -> None:
    index = NgramIndex(min_size=2, max_size=4)
    assert index.propose([1, 2, 3, 1, 2, 3, 1, 2], limit=7) == [3, 1, 2, 3, 1, 2, 3]
