"""Verifying drafts by their ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hopskip.draft.base import Draft
from hopskip.engine.choose import verify

tokens = st.integers(0, 3)


@given(st.data(), st.lists(tokens, max_size=6))
def test_keeps_exactly_what_plain_decoding_would_give(data: st.DataObject, draft_ids: list[int]) -> None:
    target_ids = data.draw(st.lists(tokens, min_size=len(draft_ids) + 1, max_size=len(draft_ids) + 1))
    path, next_token = verify(draft_ids, target_ids)
    num_accepted = len(path)
    assert path == tuple(range(num_accepted))
    kept = [*draft_ids[:num_accepted], next_token]
    assert kept == target_ids[: len(kept)]
    assert num_accepted == len(draft_ids) or draft_ids[num_accepted] != target_ids[num_accepted]
    assert verify(draft_ids, target_ids, list(range(-1, len(draft_ids) - 1))) == (path, next_token), "a chain is a tree"


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Tokens and parents; the children of one node differ."""
    parents: list[int] = []
    ids: list[int] = []
    for index in range(draw(st.integers(0, 8))):
        parent = draw(st.integers(-1, index - 1))
        taken = {ids[i] for i in range(index) if parents[i] == parent}
        if free := sorted({0, 1, 2, 3} - taken):
            parents.append(parent)
            ids.append(draw(st.sampled_from(free)))
        else:
            break
    return ids, parents


@given(trees(), st.data())
def test_follows_the_path_that_plain_decoding_would_take(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    ids, parents = tree
    target_ids = data.draw(st.lists(tokens, min_size=len(ids) + 1, max_size=len(ids) + 1))
    path, next_token = verify(ids, target_ids, parents)
    last = -1
    for index in path:
        assert parents[index] == last
        assert ids[index] == target_ids[last + 1]
        last = index
    assert next_token == target_ids[last + 1]
    assert not any(parents[i] == last and ids[i] == next_token for i in range(len(ids)))


@given(trees(), st.integers(0, 8))
def test_a_cut_tree_keeps_what_may_still_be_right(tree: tuple[list[int], list[int]], num_tokens: int) -> None:
    """The chain ends after so many tokens; runner-ups stay where their place can still be reached."""
    ids, parents = tree
    draft = Draft(token_ids=ids, parents=parents, buckets=list(range(len(ids))))
    if any(parent >= draft.num_chained for parent in parents):
        return  # exits draft leaves only
    num_tokens = min(num_tokens, draft.num_chained)
    cut = draft.cut(num_tokens)
    assert cut.parents is not None
    assert cut.token_ids[:num_tokens] == ids[:num_tokens]
    num_beside = sum(parent < num_tokens for parent in parents[draft.num_chained :])
    assert len(cut.token_ids) == num_tokens + num_beside
    assert all(parent < num_tokens for parent in cut.parents)
    before = list(zip(ids, parents, strict=True))
    assert all(pair in before for pair in zip(cut.token_ids, cut.parents, strict=True))
    chain = Draft(token_ids=ids[: draft.num_chained], buckets=list(range(draft.num_chained)))
    assert chain.cut(num_tokens).token_ids == ids[:num_tokens]
    assert chain.cut(num_tokens).buckets == list(range(num_tokens))
