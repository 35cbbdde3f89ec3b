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
from typing import Any

from torch import Tensor

from hopskip.backends.base import Cache, Model
from hopskip.backends.rows import Rows
from hopskip.draft.auto import AutoDrafter
from hopskip.draft.base import Draft, Drafter
from hopskip.draft.controller import LOOKUP, Choice, Controller, Drafting, LiveCosts
from hopskip.draft.costs import Costs, DraftCost
from hopskip.engine.engine import Engine
from hopskip.errors import ConfigError
from hopskip.sampling import SamplingParams
from hopskip.sequence import Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.trace import Proposals, Round, RoundOfSequence, Trace

BOTH = "both"
"""The fixed setting that drafts by lookup where there is a match of two tokens, else by the first exit."""


# -- recording ---------------------------------------------------------------------------------------------------------


class Onlooker(Drafter):
    """Asks every source for a draft at every position, and drafts nothing."""

    def __init__(self, auto: AutoDrafter) -> None:
        self._auto = auto
        self.taps = auto.taps
        self._seen: dict[Sequence, list[dict[str, Draft]]] = defaultdict(list)

    def observe(self, rows: Rows, states_NAD: Tensor) -> None:
        self._auto.observe(rows, states_NAD)

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        drafts = {name: source.propose(sequences, limits, cache) for name, source in self._auto.sources.items()}
        for index, sequence in enumerate(sequences):
            self._seen[sequence].append({name: found[index] for name, found in drafts.items()})
        return [Draft() for _ in sequences]

    def proposals(self, sequence: Sequence) -> Iterator[Proposals]:
        """Of a finished text, at each of its positions but the first, whose token is the prompt's."""
        text = [token.id for token in sequence.tokens]
        for position, drafts in enumerate(self._seen.pop(sequence, ()), start=1):
            yield Proposals(
                request=sequence.number,
                position=position,
                num_correct={name: _num_equal(draft.token_ids, text[position:]) for name, draft in drafts.items()},
                signs={name: draft.signs for name, draft in drafts.items()},
            )


def record(
    model: Model,
    prompts: Iterable[Seq[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Seq[int] | None = None,
    identity: Mapping[str, object] | None = None,
    on_proposals: Callable[[Proposals], None],
) -> dict[str, Any]:
    """Generate for each prompt in turn, greedily and plainly, and tell of what every source would have drafted.

    Args:
        identity: of the model's weights and precision, see `Timings`.

    Returns:
        What replays need to know of the model here, for the trace's header: `costs`, and `priors` of acceptance.
    """
    config = SpeculativeConfig(draft="auto").resolve(model.config, model.branch, row_exact=model.row_exact)
    auto = config.make_drafter(model, identity)
    assert isinstance(auto, AutoDrafter)
    onlooker = Onlooker(auto)
    engine = Engine(model, config, eos_token_ids=eos_token_ids, max_num_seqs=1, drafter=onlooker)
    for prompt in prompts:
        sequence = engine.add(prompt, SamplingParams(max_new_tokens=max_new_tokens))
        while engine.has_work:
            engine.step()
        for proposals in onlooker.proposals(sequence):
            on_proposals(proposals)
    return {"costs": asdict(auto.costs), "priors": auto.priors}


def _num_equal(a: Seq[int], b: Seq[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


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


Choose = Callable[[Proposals, int], Choice]
"""A setting: the choice at a position, at most so many tokens long."""


def replay(trace: Trace, max_draft_tokens: int = 16) -> Replay:
    """Walk through the texts of a trace with the controller, and with every fixed setting.

    Raises:
        ConfigError: the trace holds no proposals, or no costs.
    """
    if not trace.proposals:
        raise ConfigError("this trace cannot be replayed: it holds only what was drafted; make one with trace record")
    costs = costs_of(trace)
    outcomes = [_walk(trace, costs, "none", lambda proposals, limit: Choice(None, 0))]
    for source in [LOOKUP, *costs.drafts, BOTH]:
        outcomes += [
            _walk(trace, costs, f"{source}, {length}", _fixed(source, length, tuple(costs.drafts)))
            for length in range(1, max_draft_tokens + 1)
        ]
    controller = _Controlled(Controller(costs, max_draft_tokens, priors=trace.header.get("priors")))
    auto = _walk(trace, costs, "auto", controller.choose, controller.learn)
    return Replay(auto=auto, fixed=sorted(outcomes, key=lambda outcome: outcome.seconds))


def costs_of(trace: Trace) -> Costs:
    """The cost table of a trace's header."""
    try:
        table: Any = trace.header["costs"]
        return Costs(
            layers={int(rows): float(seconds) for rows, seconds in table["layers"].items()},
            head={int(rows): float(seconds) for rows, seconds in table["head"].items()},
            drafts={source: DraftCost(**cost) for source, cost in table["drafts"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ConfigError("the trace's header has no cost table; record it anew with trace record") from None


def _fixed(source: str, length: int, exits: Seq[str]) -> Choose:
    def choose(proposals: Proposals, limit: int) -> Choice:
        chosen = source
        if source == BOTH:
            match = proposals.signs[LOOKUP][:1] or [0]
            chosen = LOOKUP if match[0] >= 2 or not exits else exits[0]
        most = min(length, limit, len(proposals.signs[chosen]))
        # lookup as such wants a match of two tokens
        if chosen == LOOKUP and proposals.signs[LOOKUP][:1] < [2]:
            most = 0
        return Choice(chosen if most else None, most)

    return choose


class _Controlled:
    """The controller as a setting: it learns from each round as it would in the engine."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._request = -1
        self._sequence = Sequence([0], SamplingParams(), frozenset(), 1)

    def choose(self, proposals: Proposals, limit: int) -> Choice:
        if proposals.request != self._request:
            self._request = proposals.request
            self._sequence = Sequence([0], SamplingParams(), frozenset(), 1)
        return self._controller.plan([self._sequence], [limit], [proposals.signs[LOOKUP]])[0]

    def learn(self, proposals: Proposals, outcome: Round) -> None:
        part = outcome.sequences[0]
        signs = proposals.signs[part.source] if part.source else []
        drafting = []
        if part.source not in (None, LOOKUP):
            drafting.append(Drafting(str(part.source), part.num_draft_tokens, 1, 1, False, outcome.draft_seconds))
        self._controller.learn([self._sequence], [signs], outcome, drafting)


def _walk(
    trace: Trace,
    costs: Costs,
    setting: str,
    choose: Choose,
    learn: Callable[[Proposals, Round], None] = lambda proposals, outcome: None,
) -> Outcome:
    prices = LiveCosts(costs)
    num_tokens, num_rounds, seconds = 0, 0, 0.0
    request, due = -1, 0
    last = {proposals.request: proposals.position for proposals in trace.proposals}
    for proposals in trace.proposals:
        if proposals.request != request:
            request, due = proposals.request, proposals.position
        if proposals.position < due:
            continue  # within what an earlier round has committed
        num_left = last[request] - proposals.position  # tokens that follow the one which the pass itself yields
        source, length, _ = choose(proposals, num_left)  # replays know nothing of runner-ups
        accepted = min(length, proposals.num_correct[source]) if source else 0
        rows = length + 1
        outcome = Round(
            draft_seconds=prices.draft_seconds(source, length, 1) if source not in (None, LOOKUP) else 0.0,
            pass_seconds=prices.layers_seconds(rows),
            choose_seconds=prices.pass_seconds(rows) - prices.layers_seconds(rows),
            commit_seconds=0.0,
            num_rows=rows,
            num_chosen_by_logits=0,
            sequences=(
                RoundOfSequence(
                    request=request,
                    position=proposals.position,
                    source=source,
                    num_draft_tokens=length,
                    num_accepted_tokens=accepted,
                    num_committed=accepted + 1,
                ),
            ),
        )
        learn(proposals, outcome)
        due = proposals.position + accepted + 1
        num_tokens, num_rounds, seconds = num_tokens + accepted + 1, num_rounds + 1, seconds + outcome.seconds
    return Outcome(setting=setting, num_tokens=num_tokens, num_rounds=num_rounds, seconds=seconds)
