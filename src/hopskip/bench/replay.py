"""Replays: how the controller would have done on a text, against every fixed setting in hindsight.

A greedy text does not depend on what is drafted. So it is generated once, plainly, and at each position all sources say
what they would draft, which is compared with how the text went on (`record`). A replay then walks through the text with
any setting, takes each round's tokens from the record and its time from a cost table: seconds instead of hours, and no
noise. What the table leaves out is left out here too: the controller's own time, and costs that rise with the context.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.draft.auto import AutoDrafter
from hopskip.draft.base import Draft, Drafter, Round, RoundOfSequence
from hopskip.draft.controller import Controller
from hopskip.draft.costs import Costs
from hopskip.draft.live_costs import DraftTiming, LiveCosts
from hopskip.draft.make import Identity, prepare
from hopskip.draft.plans import Choice
from hopskip.engine.engine import Engine
from hopskip.engine.slots import common_prefix
from hopskip.engine.trace import Proposals, Trace
from hopskip.errors import ConfigError
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import LOOKUP, Source, SpeculativeConfig

T = TypeVar("T")

BOTH = "both"
"""The fixed setting that drafts by lookup where there is a match of two tokens, else by the first exit."""


# -- recording ---------------------------------------------------------------------------------------------------------


class Onlooker(Drafter):
    """Asks every source for a draft at every position, and drafts nothing."""

    def __init__(self, auto: AutoDrafter) -> None:
        self._auto = auto
        self.taps = auto.taps
        self._seen: dict[Sequence, list[dict[Source, Draft]]] = defaultdict(list)

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        self._auto.observe(rows, features_NAD)

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = {source: drafter.propose(sequences, limits, cache) for source, drafter in self._auto.sources.items()}
        for index, sequence in enumerate(sequences):
            self._seen[sequence].append({source: found[index] for source, found in drafts.items()})
        return [Draft() for _ in sequences]

    def proposals(self, sequence: Sequence) -> Iterator[Proposals]:
        """Of a finished text, at each of its positions but the first, whose token is the prompt's."""
        text = [token.id for token in sequence.tokens]
        for position, drafts in enumerate(self._seen.pop(sequence, ()), start=1):
            yield Proposals(
                request=sequence.number,
                position=position,
                num_correct={str(s): common_prefix(draft.token_ids, text[position:]) for s, draft in drafts.items()},
                buckets={str(source): draft.buckets for source, draft in drafts.items()},
            )


def record(
    backend: Backend,
    prompts: Iterable[Seq[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Seq[int] | None = None,
    identity: Identity | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
    on_proposals: Callable[[Proposals], None],
) -> dict[str, Any]:
    """Generate for each prompt in turn, greedily and plainly, and tell of what every source would have drafted.

    Args:
        eos_token_ids: end a text; None: those of the model's config.
        identity, progress: see `hopskip.draft.make.prepare`; costs that are remembered are not measured again.

    Returns:
        What replays need to know of the model here, for the trace's header: `costs`, and `priors` of acceptance.
    """
    resolved, auto = prepare(backend, SpeculativeConfig(draft="auto"), identity, progress)
    assert isinstance(auto, AutoDrafter)
    onlooker = Onlooker(auto)
    engine = Engine(backend, resolved, onlooker, eos_token_ids=eos_token_ids, max_num_seqs=1)
    for prompt in prompts:
        sequence = engine.add(Request(prompt, SamplingParams(max_new_tokens=max_new_tokens)))
        while engine.has_work:
            engine.step()
        for proposals in onlooker.proposals(sequence):
            on_proposals(proposals)
    assert auto.costs is not None, "measured above"
    return {"costs": auto.costs.as_json(), "priors": {str(source): rates for source, rates in auto.priors.items()}}


# -- replaying ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one setting gives on the texts of a trace."""

    setting: str
    """`none`, `ngram, 4`, `exit-branch, 3`, `both, 3`, `auto`."""
    num_tokens: int
    num_rounds: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The controller and all fixed settings on the same texts."""

    auto: Outcome
    fixed: list[Outcome]
    """The fastest first; plain decoding is one of them."""

    @property
    def regret(self) -> float:
        """The controller's time over that of the best fixed setting in hindsight, less 1; negative if it is faster."""
        return self.auto.seconds / self.fixed[0].seconds - 1

    @property
    def speedup(self) -> float:
        """The controller's speed over that of plain decoding."""
        plain = next(outcome for outcome in self.fixed if outcome.setting == "none")
        return plain.seconds / self.auto.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "auto": self.auto.as_dict(),
            "fixed": [outcome.as_dict() for outcome in self.fixed],
            "regret": self.regret,
            "speedup": self.speedup,
        }


@dataclass(frozen=True, kw_only=True)
class _Position:
    """`Proposals` by source."""

    request: int
    position: int
    num_correct: Mapping[Source, int]
    buckets: Mapping[Source, list[int]]


Choose = Callable[[_Position, int], Choice]
"""A setting: the choice at a position, at most so many tokens long."""


def replay(trace: Trace, max_draft_tokens: int = 16) -> Replay:
    """Walk through the texts of a trace with the controller, and with every fixed setting.

    Raises:
        ConfigError: the trace holds no proposals, or no costs, or names what is no source of drafts.
    """
    if not trace.proposals:
        raise ConfigError("this trace cannot be replayed: it holds only what was drafted; make one with trace record")
    costs, priors = costs_of(trace), _by_source(trace.header.get("priors") or {})
    text = [
        _Position(
            request=proposals.request,
            position=proposals.position,
            num_correct=_by_source(proposals.num_correct),
            buckets=_by_source(proposals.buckets),
        )
        for proposals in trace.proposals
    ]
    outcomes = [_walk(text, costs, "none", lambda position, limit: Choice(None, 0))]
    exits = tuple(costs.drafts)
    settings: dict[str, Callable[[int], Choose]] = {
        **{str(source): partial(_fixed, source) for source in (LOOKUP, *exits)},
        BOTH: partial(_both, exits),
    }
    for name, of_length in settings.items():
        outcomes += [
            _walk(text, costs, f"{name}, {length}", of_length(length)) for length in range(1, max_draft_tokens + 1)
        ]
    controller = _Controlled(Controller(costs, max_draft_tokens, priors=priors))
    auto = _walk(text, costs, "auto", controller.choose, controller.learn)
    return Replay(auto=auto, fixed=sorted(outcomes, key=lambda outcome: outcome.seconds))


def costs_of(trace: Trace) -> Costs:
    """The cost table of a trace's header."""
    try:
        return Costs.from_json(trace.header["costs"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError("the trace's header has no cost table; record it anew with trace record") from None


def _by_source(by_name: Mapping[str, T]) -> dict[Source, T]:
    try:
        return {Source.parse(name): value for name, value in by_name.items()}
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"the trace cannot be replayed ({error}); record it anew with trace record") from None


def _fixed(source: Source, length: int) -> Choose:
    """Always this source, and as many tokens."""

    def choose(position: _Position, limit: int) -> Choice:
        most = min(length, limit, len(position.buckets[source]))
        # lookup as such wants a match of two tokens
        if source == LOOKUP and position.buckets[LOOKUP][:1] < [2]:
            most = 0
        return Choice(source if most else None, most)

    return choose


def _both(exits: Seq[Source], length: int) -> Choose:
    """Lookup where there is a match of two tokens, else the first exit."""
    by_lookup = _fixed(LOOKUP, length)
    by_exit = _fixed(exits[0], length) if exits else by_lookup

    def choose(position: _Position, limit: int) -> Choice:
        return (by_exit if position.buckets[LOOKUP][:1] < [2] else by_lookup)(position, limit)

    return choose


class _Controlled:
    """The controller as a setting: it learns from each round as it would in the engine."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._request = -1
        self._sequence = _any_sequence()

    def choose(self, position: _Position, limit: int) -> Choice:
        if position.request != self._request:
            self._request = position.request
            self._sequence = _any_sequence()
        self._sequence.num_cached = position.position
        return self._controller.plan([self._sequence], [limit], [position.buckets[LOOKUP]])[0]

    def learn(self, position: _Position, choice: Choice, outcome: Round) -> None:
        source, length, _ = choice
        drafts = []
        if source not in (None, LOOKUP):
            drafts.append(DraftTiming(source, length, 1, 1, outcome.draft_seconds))
        buckets = position.buckets[source] if source else []
        self._controller.learn([self._sequence], [buckets], outcome, drafts)


def _any_sequence() -> Sequence:
    """For the controller, which tells the requests of a trace apart by it."""
    return Sequence(Request([0]), frozenset())


def _walk(
    text: Seq[_Position],
    costs: Costs,
    setting: str,
    choose: Choose,
    learn: Callable[[_Position, Choice, Round], None] = lambda position, choice, outcome: None,
) -> Outcome:
    prices = LiveCosts(costs)
    num_tokens, num_rounds, seconds = 0, 0, 0.0
    request, due = -1, 0
    last = {position.request: position.position for position in text}
    for position in text:
        if position.request != request:
            request, due = position.request, position.position
        if position.position < due:
            continue  # within what an earlier round has committed
        num_left = last[request] - position.position  # tokens that follow the one which the pass itself yields
        prices.look_at([position.position])
        choice = choose(position, num_left)
        source, length, _ = choice  # replays know nothing of runner-ups
        num_accepted = min(length, position.num_correct[source]) if source else 0
        rows = length + 1
        outcome = Round(
            draft_seconds=0.0 if source is None or source == LOOKUP else prices.draft_seconds(source, length, 1),
            pass_seconds=prices.layers_seconds(rows),
            choose_seconds=prices.pass_seconds(rows) - prices.layers_seconds(rows),
            commit_seconds=0.0,
            num_rows=rows,
            num_chosen_by_logits=0,
            sequences=(
                RoundOfSequence(
                    request=request,
                    position=position.position,
                    source=str(source) if source else None,
                    num_draft_tokens=length,
                    num_accepted_tokens=num_accepted,
                    num_committed=num_accepted + 1,
                ),
            ),
        )
        learn(position, choice, outcome)
        due = position.position + num_accepted + 1
        num_tokens, num_rounds, seconds = num_tokens + num_accepted + 1, num_rounds + 1, seconds + outcome.seconds
    return Outcome(setting=setting, num_tokens=num_tokens, num_rounds=num_rounds, seconds=seconds)
