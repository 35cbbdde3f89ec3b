"""The verifiers: properties of greedy acceptance, and the distribution that sampling leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from hopskip.engine.verify import verify_greedy, verify_sampled

tokens = st.integers(0, 3)


@given(st.data(), st.lists(tokens, max_size=6))
def test_greedy_keeps_exactly_what_plain_decoding_would_give(data: st.DataObject, draft_ids: list[int]) -> None:
    target_ids = data.draw(st.lists(tokens, min_size=len(draft_ids) + 1, max_size=len(draft_ids) + 1))
    branch, next_token = verify_greedy(draft_ids, target_ids)
    num_accepted = len(branch)
    assert branch == tuple(range(num_accepted))
    kept = [*draft_ids[:num_accepted], next_token]
    assert kept == target_ids[: len(kept)]
    assert num_accepted == len(draft_ids) or draft_ids[num_accepted] != target_ids[num_accepted]


@given(st.integers(0, 2**32), st.lists(tokens, min_size=1, max_size=5))
def test_a_draft_from_the_target_itself_is_always_accepted(seed: int, draft_ids: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.rand(len(draft_ids) + 1, 4, generator=generator) + 0.01).softmax(dim=-1)
    verdict = verify_sampled(draft_ids, list(probs[:-1]), probs, generator)
    assert verdict.num_accepted == len(draft_ids)


@given(st.integers(0, 2**32), st.booleans())
def test_a_token_the_target_rules_out_is_never_kept(seed: int, is_certain: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    target = torch.tensor([[0.0, 0.3, 0.7, 0.0]] * 2)
    draft_probs = None if is_certain else [torch.tensor([0.9, 0.05, 0.05, 0.0])]
    branch, next_token = verify_sampled([0], draft_probs, target, generator)
    assert branch == ()
    assert next_token in (1, 2)


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
def test_greedy_follows_the_branch_that_plain_decoding_would_take(
    tree: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    ids, parents = tree
    target_ids = data.draw(st.lists(tokens, min_size=len(ids) + 1, max_size=len(ids) + 1))
    branch, next_token = verify_greedy(ids, target_ids, parents)
    last = -1
    for index in branch:
        assert parents[index] == last
        assert ids[index] == target_ids[last + 1]
        last = index
    assert next_token == target_ids[last + 1]
    assert not any(parents[i] == last and ids[i] == next_token for i in range(len(ids)))


@given(st.lists(tokens, max_size=6), st.integers(0, 2**32))
def test_a_chain_is_a_tree(draft_ids: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parents = list(range(-1, len(draft_ids) - 1))
    target = (3 * torch.rand(len(draft_ids) + 1, 4, generator=generator)).softmax(dim=-1)
    draft = list((3 * torch.rand(len(draft_ids), 4, generator=generator)).softmax(dim=-1))
    target_ids = target.argmax(dim=-1).tolist()
    assert verify_greedy(draft_ids, target_ids) == verify_greedy(draft_ids, target_ids, parents)
    for probs in (draft, None):
        pair = [torch.Generator().manual_seed(seed) for _ in range(2)]
        assert verify_sampled(draft_ids, probs, target, pair[0]) == verify_sampled(
            draft_ids, probs, target, pair[1], parents
        )


@pytest.mark.parametrize("is_certain", [False, True])
def test_the_first_token_is_distributed_as_the_target_says(is_certain: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    draft = torch.tensor([0.6, 0.3, 0.1, 0.0])
    counts = torch.zeros(4)
    num_rejected = 0
    for _ in range(20_000):
        token = 0 if is_certain else int(torch.multinomial(draft, 1, generator=generator))
        verdict = verify_sampled([token], None if is_certain else [draft], target, generator)
        counts[token if verdict.num_accepted else verdict.next_token] += 1
        num_rejected += not verdict.num_accepted
    assert num_rejected > 1000
    assert chisquare(counts.numpy(), (target[0] * counts.sum()).numpy(), sum_check=False).pvalue > 0.001


def test_block_verification_accepts_what_its_paper_says() -> None:
    """The example of arXiv 2403.10444, section 3: two tokens, of which token by token accepts 10/9 on average."""
    generator = torch.Generator().manual_seed(3)
    draft, target = torch.tensor([2 / 3, 1 / 3]), torch.tensor([1 / 3, 2 / 3])
    joint = torch.zeros(2, 2)
    total, num_rounds = 0, 8_000
    for _ in range(num_rounds):
        ids = torch.multinomial(draft, 2, replacement=True, generator=generator).tolist()
        verdict = verify_sampled(ids, [draft, draft], target.expand(3, 2), generator)
        total += verdict.num_accepted
        kept = [*ids[: verdict.num_accepted], verdict.next_token]
        if len(kept) == 1:
            kept.append(int(torch.multinomial(target, 1, generator=generator)))
        joint[kept[0], kept[1]] += 1
    assert total / num_rounds == pytest.approx(11 / 9, abs=0.04)
    expected = target[:, None] * target[None, :] * num_rounds
    assert chisquare(joint.flatten().numpy(), expected.flatten().numpy(), sum_check=False).pvalue > 0.001


def test_a_draft_may_end_by_its_own_tokens() -> None:
    """A draft of up to three that ends after its first 0: the joint distribution is still the target's."""
    generator = torch.Generator().manual_seed(4)
    draft, target = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    joint = torch.zeros(3, 3)
    lengths = set()
    for _ in range(10_000):
        ids: list[int] = []
        while len(ids) < 3 and 0 not in ids:
            ids.append(int(torch.multinomial(draft, 1, generator=generator)))
        lengths.add(len(ids))
        verdict = verify_sampled(ids, [draft] * len(ids), target.expand(len(ids) + 1, 3), generator)
        kept = [*ids[: verdict.num_accepted], verdict.next_token]
        if len(kept) == 1:
            kept.append(int(torch.multinomial(target, 1, generator=generator)))
        joint[kept[0], kept[1]] += 1
    assert lengths == {1, 2, 3}
    expected = target[:, None] * target[None, :] * joint.sum()
    assert chisquare(joint.flatten().numpy(), expected.flatten().numpy(), sum_check=False).pvalue > 0.001
