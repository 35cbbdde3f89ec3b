"""Proof that speculation changes no token: against plain decoding, for every draft source, length and mode.

Greedy texts, and sampled ones with the same seed: how tokens are chosen makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Rows, Segment
from hopskip.checkpoint.config import ModelConfig
from hopskip.prove.proof import Proof, Tie
from hopskip.prove.recorder import Run, first_difference, run, same_bits
from hopskip.sampling_params import SamplingParams
from hopskip.speculative import SpeculativeConfig

Floats = NDArray[np.float32]

TIE_GAP = 1e-4
"""Two float32 logits closer than this may come in either order when a sum is taken in another order."""
DRAFT_LENGTHS = (1, 3, 6)
PLAIN = SpeculativeConfig(draft="none")

Promise = Literal["bits", "bits at the verify shape", "ids"]
"""What a model promises: the same bits however many rows are computed at once; the same bits as plain decoding run with
as many rows; or the same tokens up to ties."""

_CLAIMS: dict[Promise, str] = {
    "bits": "ids and hidden states equal plain decoding's, bit for bit",
    "bits at the verify shape": "ids and hidden states equal plain decoding's at the verify shape, bit for bit",
    "ids": "ids equal plain decoding's",
}
_MAX_PROMPTS_ONE_BY_ONE = 5
"""Where a batch would change the shape, prompts go one by one, which takes long: fewer of them then."""


def promise_of(backend: Backend) -> Promise:
    if backend.traits.row_exact:
        return "bits"
    return "ids" if backend.traits.dtype == "float32" else "bits at the verify shape"


def exits_to_try(config: ModelConfig) -> list[int]:
    """Three exit layers spread over the depth, fewer if the model has not as many, and the recommended one."""
    depth = config.num_hidden_layers
    exits = {max(1, depth // 4), depth // 2, 3 * depth // 4, config.recommended_exit_layer}
    return sorted(exit_layer for exit_layer in exits if exit_layer is not None and 0 < exit_layer < depth)


def settings_to_try(backend: Backend) -> list[SpeculativeConfig]:
    """Every combination of draft source (early exit at each exit, n-gram, both), draft length and verify mode; the
    trained exit, if one is attached, which has no states to reuse; trees; and drafts without some of the layers or by
    the copies that are attached."""
    exits, depth = exits_to_try(backend.config), backend.config.num_hidden_layers
    trained = [
        SpeculativeConfig(draft=draft, num_draft_tokens=length)
        for draft in ("exit-branch", "both")
        for length in DRAFT_LENGTHS
        if backend.trained_exit is not None
    ]
    trees = [
        SpeculativeConfig(draft=source.draft, exit_layer=source.exit_layer, num_draft_tokens=3, num_runner_ups=4)
        for source in (*trained[:1], *(SpeculativeConfig(draft="early-exit", exit_layer=exits[-1]) for _ in exits[:1]))
    ]
    sources = [SpeculativeConfig(draft="early-exit", exit_layer=exit_layer) for exit_layer in exits]
    sources.append(SpeculativeConfig(draft="ngram"))
    sources.extend(SpeculativeConfig(draft="both", exit_layer=exit_layer) for exit_layer in exits[:1])
    skipped = [(depth // 2,)] if depth > 1 else []
    selves = [
        SpeculativeConfig(draft="layer-skip", skip_layers=layers, draft_precision=precision, num_draft_tokens=length)
        for precision in (None, *backend.copies)
        for layers in skipped
        for length in DRAFT_LENGTHS
    ]
    selves += [
        SpeculativeConfig(draft="early-exit", exit_layer=exits[-1], draft_precision=precision, num_draft_tokens=3)
        for precision in backend.copies
        if exits
    ]
    return [*trained, *trees, *selves] + [
        SpeculativeConfig(draft=source.draft, exit_layer=source.exit_layer, num_draft_tokens=length, verify=mode)
        for source in sources
        for mode in ("recompute", "reuse")
        for length in DRAFT_LENGTHS
    ]


def greedy_proofs(backend: Backend, prompts: Seq[Seq[int]], max_new_tokens: int) -> Iterator[Proof]:
    """One proof for each of `settings_to_try`."""
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    return decoding_proofs(backend, prompts, params, settings_to_try(backend), promise_of(backend))


def sampled_proofs(backend: Backend, prompts: Seq[Seq[int]], params: SamplingParams) -> Iterator[Proof]:
    """One proof for each way of drafting, with a seed, at one draft length. What the rows of a pass have to do with its
    bits decides about sums that are nearly equal, and so it does wherever rows are not exact, whatever the precision.
    """
    promise: Promise = "bits" if backend.traits.row_exact else "bits at the verify shape"
    settings = [s for s in settings_to_try(backend) if s.num_draft_tokens == 3 and s.verify != "reuse"]
    return decoding_proofs(backend, prompts, params, settings, promise)


def decoding_proofs(
    backend: Backend,
    prompts: Seq[Seq[int]],
    params: SamplingParams,
    settings: Seq[SpeculativeConfig],
    promise: Promise,
) -> Iterator[Proof]:
    """A draft that is never rejected proves nothing about rejection, so a proof needs at least one; unless the early
    exit is found, in a pass of its own, to agree with the last layer everywhere."""
    num_at_once = len(prompts)
    if promise == "bits at the verify shape":
        prompts, num_at_once = prompts[:_MAX_PROMPTS_ONE_BY_ONE], 1
    references: dict[int | None, list[Run]] = {}
    for setting in settings:
        if promise == "bits at the verify shape" and setting.verify == "reuse":
            if setting.num_draft_tokens == DRAFT_LENGTHS[0]:
                yield _not_claimed(setting)
            continue
        num_rows = None
        if promise == "bits at the verify shape":
            assert setting.num_draft_tokens is not None
            num_rows = setting.num_draft_tokens + 1 + (setting.num_runner_ups or 0)
        if num_rows not in references:
            references[num_rows] = run(
                backend, prompts, PLAIN, params, max_num_seqs=num_at_once, rows_per_sequence=num_rows
            )
        runs = run(backend, prompts, setting, params, max_num_seqs=num_at_once)
        yield _judge(backend, prompts, setting, promise, references[num_rows], runs, params.is_greedy)


def _judge(
    backend: Backend,
    prompts: Seq[Seq[int]],
    setting: SpeculativeConfig,
    promise: Promise,
    references: Seq[Run],
    runs: Seq[Run],
    is_greedy: bool,
) -> Proof:
    faults: list[str] = []
    ties: list[Tie] = []
    for index, (prompt, reference, got) in enumerate(zip(prompts, references, runs, strict=True)):
        fault = None
        if promise == "ids":
            fault = compare_with_ties(backend, index, prompt, reference.token_ids, got.token_ids, ties)
        elif (position := first_difference(reference.token_ids, got.token_ids)) is not None:
            fault = (
                f"token {position} differs: {_at(got.token_ids, position)}, not {_at(reference.token_ids, position)}"
            )
        elif not same_bits(reference.states, got.states):
            fault = f"hidden states differ from position {_first_row(reference.states, got.states)} on"
        if fault:
            faults.append(f"prompt {index}: {fault}")
    num_drafted = sum(r.stats.num_draft_tokens for r in runs)
    num_rejected = num_drafted - sum(r.stats.num_accepted_tokens for r in runs)
    total, is_idle = "", not is_greedy and not num_drafted
    if is_idle:
        total = ": drawn texts seldom repeat themselves; use more prompts or more new tokens"
    elif not faults and not num_rejected:
        if num_drafted and not is_greedy:
            total = "; greedy texts prove that rejection works"
        elif num_drafted and setting.draft == "early-exit" and _exit_always_agrees(backend, setting, prompts, runs):
            total = "; none can be: the exit agrees with the last layer everywhere"
        else:
            what = "no draft was rejected" if num_drafted else "nothing was drafted"
            faults.append(f"{what}, so nothing is proved; use more prompts or more new tokens")
    detail = f"{num_rejected} of {num_drafted} draft tokens rejected{total}"
    if ties:
        detail += f"; {len(ties)} ties"
    return Proof(
        topic="greedy" if is_greedy else "sampling",
        setting=describe(setting),
        claim=_CLAIMS[promise],
        status="failed" if faults else "not claimed" if is_idle else "passed",
        detail="; ".join(faults[:3]) if faults else detail,
        counts={
            "num_prompts": len(prompts),
            "num_tokens": sum(len(r.token_ids) for r in runs),
            "num_draft_tokens": num_drafted,
            "num_rejected_tokens": num_rejected,
            "num_differing_prompts": len(faults),
        },
        ties=tuple(ties),
    )


def compare_with_ties(
    backend: Backend, index: int, prompt: Seq[int], expected: list[int], got: list[int], ties: list[Tie]
) -> str | None:
    """None if the tokens are those of plain decoding, which after a tie goes on from the token that was taken."""
    while (position := first_difference(expected, got)) is not None:
        if position >= min(len(expected), len(got)):
            return f"{len(got)} tokens, not {len(expected)}"
        before = [*prompt, *got[:position]]
        logits_V = last_logits(backend, before)
        best = best_tokens(logits_V, 2)
        gap = float(logits_V[best[0]] - logits_V[best[1]])
        if gap > TIE_GAP or got[position] not in best:
            names = f"{got[position]}, not {expected[position]}"
            return f"token {position} differs: {names} (the best two are {gap:.2g} apart)"
        ties.append(Tie(index, position, expected[position], got[position], gap))
        expected = got[: position + 1]
        if num_left := len(got) - len(expected):
            params = SamplingParams(max_new_tokens=num_left, ignore_eos=True)
            rest = run(backend, [[*before, got[position]]], PLAIN, params, max_num_seqs=1)[0]
            expected = expected + rest.token_ids
    return None


def best_tokens(logits_V: Floats, number: int) -> list[int]:
    """Those of the largest logits, best first."""
    best: list[int] = np.argsort(-logits_V, kind="stable")[:number].tolist()
    return best


def last_logits(backend: Backend, token_ids: Seq[int]) -> Floats:
    """Logits after these tokens, [V], by one pass in a cache of its own."""
    hidden_TD = hidden_states(backend, token_ids, backend.config.num_hidden_layers)
    logits_V: Floats = backend.on_host(backend.logits(hidden_TD[-1:]))[0]
    return logits_V


def hidden_states(backend: Backend, token_ids: Seq[int], num_layers: int) -> Array:
    """States after the first `num_layers` layers at every position of a text, [T, D]."""
    rows = Rows([Segment(0, 0, len(token_ids))])
    cache = backend.new_cache(1, len(token_ids))
    return backend.run_layers(backend.embed(token_ids), 0, num_layers, rows, cache).hidden_ND


def _exit_always_agrees(backend: Backend, setting: SpeculativeConfig, prompts: Seq[Seq[int]], runs: Seq[Run]) -> bool:
    """Whether the exit's best token is the generated one at every place, found without any drafting."""
    assert setting.exit_layer is not None
    for prompt, got in zip(prompts, runs, strict=True):
        hidden_TD = hidden_states(backend, [*prompt, *got.token_ids[:-1]], setting.exit_layer)
        if backend.greedy(hidden_TD[len(prompt) - 1 :]) != got.token_ids:
            return False
    return True


def _not_claimed(setting: SpeculativeConfig) -> Proof:
    lengths = ",".join(map(str, DRAFT_LENGTHS))
    return Proof(
        topic="greedy",
        setting=describe(setting, lengths),
        claim=_CLAIMS["bits"],
        status="not claimed",
        detail="in this precision on torch, bits depend on the number of rows, and reuse mixes numbers; use recompute",
    )


def describe(setting: SpeculativeConfig, lengths: str | None = None) -> str:
    """A setting in one line: `early-exit E=8 k=3 recompute`."""
    parts = [str(setting.draft)]
    if setting.exit_layer is not None:
        parts.append(f"E={setting.exit_layer}")
    if lengths or setting.num_draft_tokens:
        parts.append(f"k={lengths or setting.num_draft_tokens}")
    if setting.skip_layers is not None:
        parts.append("skip=" + ("+".join(map(str, setting.skip_layers)) or "none"))
    if setting.draft_precision:
        parts.append(setting.draft_precision)
    if setting.num_runner_ups:
        parts.append(f"runner-ups={setting.num_runner_ups}")
    if setting.verify is not None:
        parts.append(setting.verify)
    return " ".join(parts)


def _at(token_ids: list[int], position: int) -> str:
    return str(token_ids[position]) if position < len(token_ids) else "the end"


def _first_row(a: Floats, b: Floats) -> int:
    rows = (not same_bits(x, y) for x, y in zip(a, b, strict=False))
    return next((index for index, differs in enumerate(rows) if differs), min(len(a), len(b)))
