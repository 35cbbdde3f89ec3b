"""Prometheus metrics, under hopskip's own names and under those of vLLM, which routers and dashboards know."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hopskip.engine.slots import PrefixStats
from hopskip.serve.batch import Generation

_LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TPOT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_TOKEN_BUCKETS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_CHOICE_BUCKETS = (1, 2, 5, 10, 20)
_LENGTH_BUCKETS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 12)


class Metrics:
    """All metrics of one server; an `engine_thread.Observer`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._running = self._gauge("num_requests_running", "Sequences that are stepped now.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot.")
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of the cache in use, 0 to 1.")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self._copies = self._counter("prefix_cache_copies", "Beginnings copied from one row of the cache to another.")
        self._copied = self._counter("prefix_cache_copied_tokens", "Tokens of these beginnings.")
        self._evictions = self._counter("prefix_cache_evictions", "Rows that lost what an ended request had left.")
        self._known_prefixes = PrefixStats()
        self._finished = self._counter("request_success", "Sequences ended, by reason.", "finished_reason")
        self._preempted = self._counter("num_preemptions", "Sequences that lost their row before their end: none does.")
        self._inc(self._preempted, 0)
        self._request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKEN_BUCKETS)
        self._request_generated = self._histogram(
            "request_generation_tokens", "Tokens of a text.", buckets=_TOKEN_BUCKETS
        )
        self._request_n = self._histogram("request_params_n", "Texts asked for of a prompt.", buckets=_CHOICE_BUCKETS)
        self._request_max = self._histogram(
            "request_params_max_tokens", "The most tokens that a text may have.", buckets=_TOKEN_BUCKETS
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first prompt pass to the first token."
        )
        self._decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self._inference_time = self._histogram("request_inference_time_seconds", "Of both.")
        self._queue_time = self._histogram("request_queue_time_seconds", "From submission to the first prompt pass.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From submission to the first token.")
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean seconds per token after the first.", buckets=_TPOT_BUCKETS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "From one step's tokens to the next, per token.", buckets=_TPOT_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From submission to the last token.")
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds that had a draft.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._accepted_per_pos = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted at each position.", "position"
        )
        # vLLM has no such metrics: dashboards compute them
        self._acceptance_length = Histogram(
            "hopskip_mean_acceptance_length",
            "Tokens that a round with a draft yields, bonus or recovered token counted; per request.",
            list(self._labels),
            buckets=_LENGTH_BUCKETS,
            registry=self.registry,
        ).labels(**self._labels)
        self._http = Counter(
            "hopskip_http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def on_response(self, method: str, route: str, status: int) -> None:
        self._http.labels(method, route, str(status)).inc()

    # -- told by the engine's thread -----------------------------------------------------------------------------------

    def on_step(self, num_running: int, num_waiting: int, cache_usage: float, prefixes: PrefixStats) -> None:
        for gauge, value in (
            (self._running, num_running),
            (self._waiting, num_waiting),
            (self._cache_usage, cache_usage),
        ):
            for twin in gauge:
                twin.labels(**self._labels).set(value)
        known = self._known_prefixes
        if prefixes != known:
            self._inc(self._copies, prefixes.num_copies - known.num_copies)
            self._inc(self._copied, prefixes.num_copied_tokens - known.num_copied_tokens)
            self._inc(self._evictions, prefixes.num_evictions - known.num_evictions)
            self._known_prefixes = replace(prefixes)

    def on_tokens(self, generation: Generation, num_tokens: int, now: float) -> None:
        self._inc(self._generated, num_tokens)
        if generation.last_token_at is None:
            self._observe(self._ttft, now - generation.submitted_at)
            self._observe(self._queue_time, max(0.0, generation.sequence.prefill_started - generation.submitted_at))
        else:
            self._observe(self._inter_token, (now - generation.last_token_at) / num_tokens)

    def on_finish(self, generation: Generation, now: float) -> None:
        sequence, stats = generation.sequence, generation.sequence.stats
        self._inc(self._finished, 1, finished_reason=sequence.finish_reason or "")
        if not sequence.first_token_at:
            return  # its prompt has not been read
        if generation.job.counts_prompt:
            self._inc(self._prompt_tokens, stats.num_prompt_tokens)
            self._observe(self._request_prompt, stats.num_prompt_tokens)
            self._observe(self._request_n, generation.job.num_choices)
        self._observe(self._request_generated, stats.num_tokens)
        self._observe(self._request_max, sequence.params.max_new_tokens)
        self._observe(self._prefill_time, stats.prefill_seconds)
        self._observe(self._decode_time, stats.decode_seconds)
        self._observe(self._inference_time, stats.prefill_seconds + stats.decode_seconds)
        self._inc(self._cache_queries, stats.num_prompt_tokens)
        self._inc(self._cache_hits, stats.num_cached_prompt_tokens)
        self._observe(self._e2e, now - generation.submitted_at)
        if stats.num_tokens > 1:
            self._observe(self._tpot, (now - sequence.first_token_at) / (stats.num_tokens - 1))
        self._inc(self._drafts, stats.num_drafts)
        self._inc(self._drafted, stats.num_draft_tokens)
        self._inc(self._accepted, stats.num_accepted_tokens)
        for position, count in enumerate(stats.num_accepted_tokens_per_pos):
            self._inc(self._accepted_per_pos, count, position=str(position))
        if stats.num_drafts:
            self._acceptance_length.observe(stats.mean_acceptance_length)

    # -- every metric twice --------------------------------------------------------------------------------------------

    def _gauge(self, name: str, text: str) -> list[Gauge]:
        return [Gauge(full, text, list(self._labels), registry=self.registry) for full in _names(name)]

    def _counter(self, name: str, text: str, *labels: str) -> list[Counter]:
        return [Counter(full, text, [*self._labels, *labels], registry=self.registry) for full in _names(name)]

    def _histogram(self, name: str, text: str, buckets: Seq[float] = _LATENCY_BUCKETS) -> list[Histogram]:
        return [
            Histogram(full, text, list(self._labels), buckets=buckets, registry=self.registry) for full in _names(name)
        ]

    def _inc(self, counters: list[Counter], amount: float, **labels: str) -> None:
        for counter in counters:
            counter.labels(**self._labels, **labels).inc(amount)

    def _observe(self, histograms: list[Histogram], value: float) -> None:
        for histogram in histograms:
            histogram.labels(**self._labels).observe(value)


def _names(name: str) -> tuple[str, str]:
    return f"hopskip_{name}", f"vllm:{name}"
