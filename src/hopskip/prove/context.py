"""Proof that a text does not depend on what else the engine holds: cached prefixes, companions in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from hopskip.backends.base import Backend
from hopskip.engine.engine import Engine, make_engine
from hopskip.prove.greedy import exits_to_try
from hopskip.prove.proof import Proof
from hopskip.prove.recorder import first_difference, run, same_bits
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request
from hopskip.speculative import SpeculativeConfig

_PREFIX_CLAIM = "a prompt that starts from a cached prefix gives the same ids"
_BATCH_CLAIM = "a prompt gives the same ids and hidden states alone and in a batch, bit for bit"


def context_proofs(backend: Backend, prompts: Seq[Seq[int]], max_new_tokens: int) -> Iterator[Proof]:
    """Claimed where the bits of a row depend on its own tokens only."""
    if not backend.traits.row_exact:
        reason = "on torch, the bits of a row depend on how many rows are computed with it"
        for setting, claim in (("prefix cache", _PREFIX_CLAIM), ("batch", _BATCH_CLAIM)):
            yield Proof(topic="context", setting=setting, claim=claim, status="not claimed", detail=reason)
        return
    draft = SpeculativeConfig(draft="both" if exits_to_try(backend.config) else "ngram", num_draft_tokens=3)
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    yield _prefix_proof(backend, prompts, draft, params)
    yield _batch_proof(backend, prompts, draft, params)


def _prefix_proof(backend: Backend, prompts: Seq[Seq[int]], draft: SpeculativeConfig, params: SamplingParams) -> Proof:
    """Each prompt twice in one engine, then a prompt that goes on from the first one's answer, as a chat does."""
    faults: list[str] = []
    num_cached = 0
    for index, prompt in enumerate(prompts):
        engine = make_engine(backend, draft, max_num_seqs=1, prefix_caching=True)
        answer = _answer(engine, prompt, params)[0]
        for name, ids in (("again", prompt), ("continued", [*prompt, *answer, *prompt[:8]])):
            fresh = run(backend, [ids], draft, params, max_num_seqs=1)[0].token_ids
            got, num_reused = _answer(engine, ids, params)
            num_cached += num_reused
            if (position := first_difference(fresh, got)) is not None:
                faults.append(f"prompt {index} {name}: token {position} differs")
            if not num_reused:
                faults.append(f"prompt {index} {name}: nothing was taken from the cache, so nothing is proved")
    return Proof(
        topic="context",
        setting=f"prefix cache, {draft.draft} k={draft.num_draft_tokens}",
        claim=_PREFIX_CLAIM,
        status="failed" if faults else "passed",
        detail="; ".join(faults[:3]) or f"{num_cached} prompt tokens came from the cache",
        counts={"num_prompts": len(prompts), "num_cached_prompt_tokens": num_cached},
    )


def _answer(engine: Engine, prompt: Seq[int], params: SamplingParams) -> tuple[list[int], int]:
    """Generated ids, and how many tokens of the prompt were taken from the cache."""
    sequence = engine.add(Request(prompt, params))
    while engine.has_work:
        engine.step()
    return [token.id for token in sequence.tokens], sequence.stats.num_cached_prompt_tokens


def _batch_proof(backend: Backend, prompts: Seq[Seq[int]], draft: SpeculativeConfig, params: SamplingParams) -> Proof:
    alone = run(backend, prompts, draft, params, max_num_seqs=1)
    together = run(backend, prompts, draft, params, max_num_seqs=len(prompts))
    faults = [
        f"prompt {index}: the text or its hidden states differ"
        for index, (a, b) in enumerate(zip(alone, together, strict=True))
        if a.token_ids != b.token_ids or not same_bits(a.states, b.states)
    ]
    if len(prompts) < 2:
        faults.append("one prompt is no batch, so nothing is proved; use more prompts")
    return Proof(
        topic="context",
        setting=f"batch of {len(prompts)}, {draft.draft} k={draft.num_draft_tokens}",
        claim=_BATCH_CLAIM,
        status="failed" if faults else "passed",
        detail="; ".join(faults[:3]) or f"{sum(len(r.token_ids) for r in together)} tokens equal",
        counts={"num_prompts": len(prompts)},
    )
