"""Measure contenders side by side: prompt by prompt in turn, prefill and decode apart, medians.

Contenders take turns; ratios are taken prompt by prompt, between runs that were neighbours in time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import Any, Literal

from hopskip.bench.contenders import Contender, Footprint, Measurement
from hopskip.bench.turns import take_turns
from hopskip.bench.worker import Worker, WorkerError
from hopskip.prompts import Prompt

Status = Literal["measured", "absent", "failed"]


@dataclass(frozen=True, kw_only=True)
class PromptResult:
    """One contender on one prompt; rates are medians over the repeats."""

    set: str
    id: str
    num_prompt_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    tokens_per_pass: float
    mean_acceptance_length: float
    matches_plain: bool | None = None
    """Whether the tokens are those of the contender that this one speculates on top of; None if there is none."""


@dataclass(kw_only=True)
class Result:
    """One contender on all prompts."""

    contender: Contender
    status: Status = "measured"
    reason: str | None = None
    """Why it is absent or has failed."""
    footprint: Footprint | None = None
    runs: list[list[Measurement]] = field(default_factory=list)
    """By prompt, then by repeat."""
    per_prompt: list[PromptResult] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.contender.name

    def middle(self, field_name: str, prompt_set: str | None = None) -> float | None:
        """Median of a figure over the prompts (of one set); None without any."""
        values = [getattr(p, field_name) for p in self.per_prompt if prompt_set in (None, p.set)]
        return median(values) if values else None

    @property
    def lossless(self) -> bool | None:
        """Whether every prompt gave the plain contender's tokens; None where there is nothing to compare with."""
        matches = [p.matches_plain for p in self.per_prompt]
        return None if not matches or None in matches else all(matches)

    def mbu(self, num_tokens: int, read_bandwidth: float) -> float | None:
        """Bytes that plain decoding reads per token (weights, and keys and values at mid-text), times tokens per
        second, over the bandwidth measured. For plain decoding the share of the limit; only speculation passes 1."""
        if self.footprint is None or not self.per_prompt:
            return None
        return (
            median(
                self.footprint.bytes_per_token(p.num_prompt_tokens + num_tokens / 2) * p.decode_tokens_per_second
                for p in self.per_prompt
            )
            / read_bandwidth
        )


def measure(
    contenders: Seq[Contender],
    prompts: Seq[tuple[Prompt, list[int]]],
    *,
    num_tokens: int,
    repeats: int,
    threads: int,
    on_step: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Run every contender on every prompt, `repeats` times, after one run to warm up.

    One that is absent or fails is reported as such, and the others go on without it.

    Args:
        prompts: with their token ids, the same for every contender.
        num_tokens: tokens to generate, at least 2: the first belongs to the prompt's pass.
        on_step: called with a contender's name before its every run.
    """
    assert num_tokens > 1
    results = {contender.name: Result(contender=contender, runs=[[] for _ in prompts]) for contender in contenders}
    assert len(results) == len(contenders), "contenders need different names"
    # a padded verify pass may reach past the last token
    max_model_len = max(len(ids) for _, ids in prompts) + num_tokens + 32
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, result in results.items():
            on_step(name)
            with _reporting(result):
                workers[name] = stack.enter_context(Worker(result.contender, threads, max_model_len))
                result.footprint = workers[name].footprint
                workers[name].generate(prompts[0][1], num_tokens)

        def run(name: str, index: int) -> None:
            result = results[name]
            if result.status == "measured":
                on_step(name)
                with _reporting(result):
                    result.runs[index].append(workers[name].generate(prompts[index][1], num_tokens))

        take_turns(
            {name: partial(run, name) for name in workers if results[name].status == "measured"},
            [index for _ in range(repeats) for index in range(len(prompts))],
        )
    for result in results.values():
        if result.status == "measured":
            plain = results.get(result.contender.plain or "")
            result.per_prompt = [
                _summary(prompt, ids, result.runs[i], plain.runs[i] if plain else [])
                for i, (prompt, ids) in enumerate(prompts)
            ]
    return list(results.values())


class _reporting:  # noqa: N801  # reads as a statement: `with _reporting(result):`
    """Turns a worker's error into the result's status."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, WorkerError):
            return False
        self._result.status = "absent" if error.is_absent else "failed"
        self._result.reason = str(error)
        return True


def _summary(prompt: Prompt, ids: list[int], runs: Seq[Measurement], plain_runs: Seq[Measurement]) -> PromptResult:
    return PromptResult(
        set=prompt.set,
        id=prompt.id,
        num_prompt_tokens=len(ids),
        prefill_tokens_per_second=median(len(ids) / run.prefill_seconds for run in runs),
        decode_tokens_per_second=median(run.decode_tokens_per_second for run in runs),
        tokens_per_pass=median(run.tokens_per_pass for run in runs),
        mean_acceptance_length=median(run.mean_acceptance_length for run in runs),
        matches_plain=all(run.token_ids == plain_runs[0].token_ids for run in runs) if plain_runs else None,
    )


def ratio(ours: Result, theirs: Result, field_name: str, prompt_set: str | None = None) -> float | None:
    """Median over the prompts (of one set) of our figure over theirs; None if one of them has none."""
    pairs = zip(ours.per_prompt, theirs.per_prompt, strict=False)
    ratios = [getattr(a, field_name) / getattr(b, field_name) for a, b in pairs if prompt_set in (None, a.set)]
    return median(ratios) if ratios else None


def _decode_ratios(ours: Result, theirs: Result, sets: Seq[str]) -> dict[str, float | None]:
    """Over all prompts, of each set, and the mean of the sets, where each counts alike however many prompts it has."""
    by_set = {name: ratio(ours, theirs, "decode_tokens_per_second", name) for name in sets}
    known = [value for value in by_set.values() if value is not None]
    overall = ratio(ours, theirs, "decode_tokens_per_second")
    return {"all": overall, "mean_of_sets": mean(known) if known else None, **by_set}


def is_quoted(result: Result, results: Seq[Result]) -> bool:
    """False for an opponent's slower variant: nobody should be measured by that."""
    rates = [
        (other.middle("decode_tokens_per_second") or 0.0, other.name)
        for other in results
        if other.contender.variant_of == result.contender.variant_of
    ]
    return result.contender.variant_of is None or max(rates)[1] == result.name


def report(
    results: Seq[Result],
    *,
    machine: Mapping[str, Any],
    versions: Mapping[str, str | None],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything measured, ready for JSON: `machine`, `versions`, `settings`, `contenders` (ours first)."""
    sets = list(dict.fromkeys(p.set for result in results for p in result.per_prompt))
    num_tokens, bandwidth = settings["max_new_tokens"], machine["read_bytes_per_second"]
    return {
        "machine": dict(machine),
        "versions": dict(versions),
        "settings": dict(settings),
        "contenders": [
            {
                "name": result.name,
                "status": result.status,
                "quoted": is_quoted(result, results),
                "reason": result.reason,
                "prefill_tokens_per_second": result.middle("prefill_tokens_per_second"),
                "decode_tokens_per_second": result.middle("decode_tokens_per_second"),
                "mbu": result.mbu(num_tokens, bandwidth),
                "tokens_per_pass": result.middle("tokens_per_pass"),
                "mean_acceptance_length": result.middle("mean_acceptance_length"),
                "lossless": result.lossless,
                "lossless_against": result.contender.plain,
                "weight_bytes": result.footprint.weight_bytes if result.footprint else None,
                "by_set": {
                    name: {
                        "prefill_tokens_per_second": result.middle("prefill_tokens_per_second", name),
                        "decode_tokens_per_second": result.middle("decode_tokens_per_second", name),
                        "tokens_per_pass": result.middle("tokens_per_pass", name),
                        "mean_acceptance_length": result.middle("mean_acceptance_length", name),
                    }
                    for name in sets
                },
                "decode_ratio_to": {
                    other.name: _decode_ratios(result, other, sets)
                    for other in results
                    if other is not result and other.per_prompt and result.per_prompt
                },
                "prefill_ratio_to": {
                    other.name: ratio(result, other, "prefill_tokens_per_second")
                    for other in results
                    if other is not result and other.per_prompt and result.per_prompt
                },
                "per_prompt": [vars(p) for p in result.per_prompt],
            }
            for result in results
        ],
    }
