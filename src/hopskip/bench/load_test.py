"""Load on an OpenAI-compatible server, ours or another: latencies and throughput at several levels of concurrency."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hopskip.bench.plot import save
from hopskip.errors import ConfigError
from hopskip.prompts import Prompt

if TYPE_CHECKING:
    import httpx

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request, timed by its client."""

    seconds: float
    first_token_seconds: float
    num_tokens: int
    """As the server counts them."""
    error: str | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token (TPOT); None if there was no second."""
        if self.num_tokens < 2:
            return None
        return (self.seconds - self.first_token_seconds) / (self.num_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to send requests, and what all of them ask for.

    Args:
        url: of the server; `/v1` may end it.
        model: None takes the first that the server lists.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    extra: Mapping[str, Any] | None = None
    """Further fields of the request's body."""

    def client(self) -> httpx.AsyncClient:
        import httpx

        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        base = self.url.rstrip("/").removesuffix("/v1")
        return httpx.AsyncClient(base_url=base, headers=headers, timeout=600, limits=httpx.Limits(max_connections=None))


async def run_load(
    target: Target,
    prompts: Seq[Prompt],
    concurrencies: Seq[int],
    num_requests: int,
    on_level: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Send `num_requests` requests at each level, so many at a time, prompts in turn; a report ready for JSON.

    Every level is preceded by as many unmeasured requests as it runs at a time.

    Raises:
        ConfigError: the server cannot be reached, or lists no model.
    """
    async with target.client() as client:
        model = target.model or str((await first_model(client, target.url))["id"])
        bodies = [_body(target, model, prompt) for prompt in prompts]
        levels = []
        for concurrency in concurrencies:
            on_level(concurrency)
            await _level(client, bodies, concurrency, concurrency)
            started = time.perf_counter()
            samples = await _level(client, bodies, concurrency, num_requests)
            levels.append(summary(samples, concurrency, time.perf_counter() - started))
    return {
        "url": target.url,
        "model": model,
        "num_prompts": len(prompts),
        "num_requests": num_requests,
        "max_tokens": target.max_tokens,
        "temperature": target.temperature,
        "extra": dict(target.extra or {}),
        "levels": levels,
    }


def summary(samples: Seq[Sample], concurrency: int, seconds: float) -> dict[str, Any]:
    """Figures of one level. Failed requests count in `num_failed` only."""
    good = [s for s in samples if s.error is None]
    num_tokens = sum(s.num_tokens for s in good)
    return {
        "concurrency": concurrency,
        "num_requests": len(samples),
        "num_failed": len(samples) - len(good),
        "errors": sorted({s.error for s in samples if s.error is not None}),
        "seconds": seconds,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds if seconds > 0 else 0.0,
        "requests_per_second": len(good) / seconds if seconds > 0 else 0.0,
        "first_token_seconds": percentiles([s.first_token_seconds for s in good]),
        "seconds_per_token": percentiles([s.seconds_per_token for s in good if s.seconds_per_token is not None]),
        "request_seconds": percentiles([s.seconds for s in good]),
    }


def percentiles(values: Seq[float]) -> dict[str, float] | None:
    """Mean and percentiles (the nearest value of rank p/100 x n, rounded up); None for no values.

    >>> percentiles([4.0, 1.0, 3.0, 2.0])
    {'mean': 2.5, 'p50': 2.0, 'p90': 4.0, 'p99': 4.0}
    """
    if not values:
        return None
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks}


async def _level(
    client: httpx.AsyncClient, bodies: Seq[Mapping[str, Any]], concurrency: int, num_requests: int
) -> list[Sample]:
    samples: list[Sample] = []
    numbers = iter(range(num_requests))

    async def work() -> None:
        for number in numbers:
            samples.append(await _request(client, bodies[number % len(bodies)]))  # noqa: PERF401

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return samples


async def _request(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Sample:
    import httpx

    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    started = time.perf_counter()
    first: float | None = None
    num_tokens = 0
    error: str | None = None
    try:
        async with client.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                error = f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    error = "an error in the stream"
                    break
                if first is None and any(_has_text(choice) for choice in chunk["choices"]):
                    first = time.perf_counter()
                num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
    except (httpx.HTTPError, ValueError, KeyError) as failure:
        error = type(failure).__name__
    ended = time.perf_counter()
    return Sample(
        seconds=ended - started, first_token_seconds=(first or ended) - started, num_tokens=num_tokens, error=error
    )


def _has_text(choice: Mapping[str, Any]) -> bool:
    return bool(choice.get("text") or (choice.get("delta") or {}).get("content"))


def _body(target: Target, model: str, prompt: Prompt) -> dict[str, Any]:
    return {
        "model": model,
        "messages": messages_of(prompt),
        "max_tokens": target.max_tokens,
        "temperature": target.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(target.extra or {}),
    }


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """As a chat."""
    content = prompt.content
    return [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]


async def first_model(client: httpx.AsyncClient, url: str) -> Mapping[str, Any]:
    """The card of the first model that a server lists.

    Raises:
        ConfigError: it cannot be reached, or lists none.
    """
    import httpx

    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        card: Mapping[str, Any] = answer.json()["data"][0]
        _ = card["id"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"url is {url!r}: no OpenAI server lists its models there ({reason})") from None
    return card


def write_load_plot(report: Mapping[str, Any], path: Path) -> None:
    """Throughput, and latencies, over concurrency.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    levels = [level for level in report["levels"] if level["first_token_seconds"] and level["seconds_per_token"]]
    x = [level["concurrency"] for level in levels]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    throughput, ttft, tpot = figure.subplots(1, 3)
    throughput.plot(x, [level["tokens_per_second"] for level in levels], "o-")
    throughput.set_ylabel("tokens/s, all requests")
    for axes, name, label in (
        (ttft, "first_token_seconds", "first token, ms"),
        (tpot, "seconds_per_token", "per token, ms"),
    ):
        for key, style in (("p50", "o-"), ("p90", "o--"), ("p99", "o:")):
            axes.plot(x, [1000 * level[name][key] for level in levels], style, label=key)
        axes.set_ylabel(label)
        axes.legend()
    for axes in (throughput, ttft, tpot):
        axes.set_xlabel("concurrent requests")
        axes.set_ylim(bottom=0)
    figure.suptitle(f"{report['model']}, {report['max_tokens']} tokens", fontsize="medium")
    save(figure, path)
