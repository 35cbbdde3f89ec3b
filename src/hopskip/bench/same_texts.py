"""Does speculation change what a server writes? Any OpenAI-compatible server, asked with and without it.

Both sides get the same prompts, greedily. Where two texts part, the reference is asked once more, with
log-probabilities: how far apart were the two tokens there? And whether the reference repeats its own texts is found
out first, since a server whose texts hang on more than the prompt proves nothing about its speculation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hopskip.bench.load_test import Target, first_model, messages_of
from hopskip.errors import ConfigError
from hopskip.prompts import Prompt

if TYPE_CHECKING:
    import httpx

WITHOUT_SPECULATION: Mapping[str, Any] = {"speculative": {"enabled": False}}
"""Fields that turn it off, of a request to hopskip's server."""
_NUM_ALTERNATIVES = 20
"""As many as OpenAI's API gives."""
_SHOWN = 40
"""Characters of each text that are shown where they part."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where two greedy texts of one prompt part."""

    prompt: str
    """Its set and its name there: `gsm8k/17`."""
    position: int
    """Characters that are the same."""
    expected: str
    """How the reference goes on."""
    got: str
    token: int | None = None
    """Index of the reference's token that the other side has not written; None if the server gives no
    log-probabilities, or writes yet another text when asked for them."""
    gap: float | None = None
    """How much less likely the reference holds what the other side wrote there, in natural logarithms; None as above,
    and where it is not among the `_NUM_ALTERNATIVES` best."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The outcome."""

    url: str
    reference_url: str
    model: str
    num_prompts: int
    max_tokens: int
    concurrency: int
    partings: tuple[Parting, ...]
    own_partings: tuple[Parting, ...]
    """Of the reference from itself."""
    max_gap: float

    @property
    def failures(self) -> tuple[Parting, ...]:
        """Partings that are more than ties."""
        return tuple(p for p in self.partings if p.gap is None or p.gap > self.max_gap)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def summary(self) -> str:
        num_equal = self.num_prompts - len(self.partings)
        num_ties = len(self.partings) - len(self.failures)
        return f"{num_equal} of {self.num_prompts} texts equal" + (f", {num_ties} tied" if num_ties else "")

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "summary": self.summary}

    def badge(self) -> dict[str, Any]:
        """What shields.io draws a badge from (its endpoint schema)."""
        colour = "brightgreen" if self.passed else "red"
        return {"schemaVersion": 1, "label": "lossless speculation", "message": self.summary, "color": colour}


@dataclass(frozen=True)
class _Reply:
    text: str
    finish_reason: str | None
    tokens: tuple[Mapping[str, Any], ...] = ()
    """With log-probabilities, if they were asked for."""


async def compare(
    target: Target,
    prompts: Seq[Prompt],
    *,
    reference: Target | None = None,
    concurrency: int = 1,
    max_gap: float = 0.0,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Comparison:
    """Ask both sides for every prompt.

    Args:
        target: the server with its speculation.
        reference: the same without; None: the same server, which must be hopskip's.
        concurrency: requests at a time.
        max_gap: partings up to it are ties.

    Raises:
        ConfigError: a server cannot be reached, cannot turn its speculation off, or refuses a request.
    """
    async with target.client() as client:
        model, is_ours = await _model_of(client, target)
        if reference is None:
            if not is_ours:
                raise ConfigError(
                    f"{target.url} is not hopskip's server, and how to turn its speculation off is not known: name a "
                    "server without speculation by --reference, or the fields of a request that turn it off by "
                    "--without"
                )
            reference = replace(target, extra={**(target.extra or {}), **WITHOUT_SPECULATION})
        async with reference.client() as other_client:
            other_model = await _model_of(other_client, reference)
            sides = [(other_client, reference, other_model[0]), (client, target, model)]
            replies: list[list[_Reply]] = []
            passes = (("asking without speculation", 0), ("asking with speculation", 1), ("asking without again", 0))
            for number, (what, side) in enumerate(passes):

                def done(share: float, what: str = what, number: int = number) -> None:
                    on_progress(what, (number + share) / len(passes))

                done(0.0)
                replies.append(await _ask_all(*sides[side], prompts, concurrency, done))
            plain, drafted, again = replies
            partings = await _partings(*sides[0], prompts, plain, drafted)
            own_partings = await _partings(*sides[0], prompts, plain, again)
    return Comparison(
        url=target.url,
        reference_url=reference.url,
        model=model,
        num_prompts=len(prompts),
        max_tokens=target.max_tokens,
        concurrency=concurrency,
        partings=tuple(partings),
        own_partings=tuple(own_partings),
        max_gap=max_gap,
    )


async def _model_of(client: httpx.AsyncClient, target: Target) -> tuple[str, bool]:
    """Its name, and whether the server is hopskip's."""
    card = await first_model(client, target.url)
    return target.model or str(card["id"]), "hopskip" in card


async def _ask_all(
    client: httpx.AsyncClient,
    target: Target,
    model: str,
    prompts: Seq[Prompt],
    concurrency: int,
    done: Callable[[float], None],
) -> list[_Reply]:
    replies: dict[int, _Reply] = {}
    numbers = iter(range(len(prompts)))

    async def work() -> None:
        for number in numbers:
            replies[number] = await _ask(client, target, model, prompts[number])
            done(len(replies) / len(prompts))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return [replies[number] for number in range(len(prompts))]


async def _ask(
    client: httpx.AsyncClient, target: Target, model: str, prompt: Prompt, *, logprobs: bool = False
) -> _Reply:
    """Raises ConfigError: the server refuses, or gives no answer."""
    import httpx

    body = {
        "model": model,
        "messages": messages_of(prompt),
        "max_tokens": target.max_tokens,
        "temperature": 0,
        **({"logprobs": True, "top_logprobs": _NUM_ALTERNATIVES} if logprobs else {}),
        **(target.extra or {}),
    }
    try:
        answer = await client.post("/v1/chat/completions", json=body)
        found = answer.json()
        if answer.status_code == 200:
            choice = found["choices"][0]
            scored = (choice.get("logprobs") or {}).get("content") or ()
            return _Reply(choice["message"].get("content") or "", choice.get("finish_reason"), tuple(scored))
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{target.url} gives no answer to a chat that can be read ({reason})") from None
    refusal = found.get("error", found) if isinstance(found, dict) else found
    reason = refusal.get("message", refusal) if isinstance(refusal, dict) else refusal
    raise ConfigError(f"{target.url} refuses a request with status {answer.status_code}: {str(reason)[:300]}")


async def _partings(
    client: httpx.AsyncClient,
    reference: Target,
    model: str,
    prompts: Seq[Prompt],
    expected: Seq[_Reply],
    got: Seq[_Reply],
) -> list[Parting]:
    found: list[Parting] = []
    for prompt, one, other in zip(prompts, expected, got, strict=True):
        if one == other:
            continue
        position = common_length(one.text, other.text)
        token = gap = None
        try:
            scored = await _ask(client, reference, model, prompt, logprobs=True)
        except ConfigError:  # it may not know log-probabilities
            scored = _Reply("", None)
        if scored.text == one.text:
            token, gap = gap_at(scored.tokens, position, other.text)
        parting = Parting(
            prompt=f"{prompt.set}/{prompt.id}",
            position=position,
            expected=_rest(one, position),
            got=_rest(other, position),
            token=token,
            gap=gap,
        )
        found.append(parting)
    return found


def _rest(reply: _Reply, position: int) -> str:
    """How a text goes on, or that it ends there."""
    return reply.text[position : position + _SHOWN] or f"({reply.finish_reason})"


def common_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike.

    >>> common_length("four", "fort")
    2
    """
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def gap_at(tokens: Seq[Mapping[str, Any]], position: int, other: str) -> tuple[int | None, float | None]:
    """Which token of a text the other one has not, and how much less likely the other's was.

    Args:
        tokens: of the one text, as OpenAI's `logprobs.content`.
        position: characters that the texts begin with alike.
        other: the whole other text.

    >>> best = {"token": "e", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": -0.75}]}
    >>> gap_at([{"token": "a", "logprob": -0.1}, best], 1, "abc")
    (1, 0.25)
    """
    start, common, other_bytes = 0, len(other[:position].encode()), other.encode()
    for index, token in enumerate(tokens):
        own = _bytes_of(token)
        if start + len(own) > common:
            rest = other_bytes[start:]
            alternatives = [(_bytes_of(each), float(each["logprob"])) for each in token.get("top_logprobs") or ()]
            # of those that the other text may go on with, the likeliest
            fitting = [logprob for data, logprob in alternatives if data and data != own and rest.startswith(data)]
            return index, float(token["logprob"]) - max(fitting) if fitting else None
        start += len(own)
    return (len(tokens), None) if tokens and start == common else (None, None)


def _bytes_of(token: Mapping[str, Any]) -> bytes:
    """Of a piece of a character, which the text cannot show, too."""
    return bytes(token["bytes"]) if token.get("bytes") else str(token["token"]).encode()
