"""What clients of one server have of each other: rows, the queue, the prefix cache, and nothing of their texts."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from benchmarks.seeds import differing, history, requests_of

from hopskip import LLM, ConfigError, SamplingParams
from hopskip.errors import BusyError
from hopskip.sequence import Request
from hopskip.serve.batch import Job
from hopskip.serve.queue import Queue, Room
from hopskip.serve.settings import ServeSettings
from tests.serving import Brake, live_server, tiny_llm

KEYS = ("first-key", "second-key")
LONG_TEXT = "A long text that has quite a number of tokens in it, and then some more. " * 3


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    """Its rows are all there, as `hopskip serve` makes them."""
    llm = tiny_llm(tmp_path, "none", max_num_seqs=4, prefix_caching=True)
    llm.engine.reserve(2**28, shrink=True)
    return llm


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def completion(client: httpx.Client, key: str | None = None, **changes: Any) -> httpx.Response:
    body = {"prompt": LONG_TEXT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **changes}
    return client.post("/v1/completions", json=body, headers=bearer(key) if key else {})


def num_cached(answer: httpx.Response) -> int:
    count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


# -- the prefix cache --------------------------------------------------------------------------------------------------


def test_nobody_learns_what_another_key_has_asked(llm: LLM) -> None:
    with live_server(llm, api_keys=KEYS) as live, live.client() as client:
        first = completion(client, KEYS[0])
        assert num_cached(completion(client, KEYS[1])) == 0
        assert num_cached(completion(client, KEYS[0])) == first.json()["usage"]["prompt_tokens"] - 1
        assert num_cached(completion(client, KEYS[0], cache_salt="of a user")) == 0
        assert num_cached(completion(client, KEYS[0], cache_salt="of a user")) > 0
        assert num_cached(completion(client, KEYS[1], cache_salt="of a user")) == 0


def test_metrics_tell_of_hits_copies_and_evictions(llm: LLM) -> None:
    with live_server(llm) as live, live.client() as client:
        prompt = completion(client, n=3).json()["usage"]["prompt_tokens"]
        for salt in "abcd":
            assert num_cached(completion(client, cache_salt=salt)) == 0
        text = client.get("/metrics", headers=bearer(KEYS[0])).text
    values = dict(re.findall(r"^hopskip_prefix_cache_(\w+)_total\{.*\} ([\d.]+)", text, flags=re.MULTILINE))
    assert {name: float(value) for name, value in values.items()} == {
        "queries": 7 * prompt,
        "hits": 2 * (prompt - 1),
        "copies": 2,
        "copied_tokens": 2 * (prompt - 1),
        "evictions": 3,
    }


# -- the queue ---------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def jobs(count: int, client: str | None = None, num_prompt: int = 5, num_new: int = 5) -> list[Job]:
    request = Request([1] * num_prompt, SamplingParams(max_new_tokens=num_new), client=client)
    return [Job(request=request) for _ in range(count)]


def queue_of(total: int, own: int, tokens: float = 10**9) -> tuple[Queue, Clock]:
    clock = Clock()
    return Queue(Room(num_sequences=total), Room(num_sequences=own, num_tokens=tokens), clock), clock


def test_a_queue_has_room_for_all_or_for_one_client() -> None:
    queue, _ = queue_of(6, 4)
    queue.enter(jobs(3, "a"))
    with pytest.raises(BusyError, match="3 sequences of your API key's run or wait; at most 4 may"):
        queue.enter(jobs(2, "a"))
    queue.enter(jobs(1, "a"))
    queue.enter(jobs(2, "b"))
    with pytest.raises(BusyError, match="6 sequences of all requests"):
        queue.enter(jobs(1))
    queue.leave(jobs(2, "a"))
    queue.enter(jobs(2))
    assert len(queue) == 6


def test_what_never_fits_is_no_matter_of_time() -> None:
    queue, _ = queue_of(6, 4)
    with pytest.raises(ConfigError, match="asks for 7 sequences; at most 6"):
        queue.enter(jobs(7))
    with pytest.raises(ConfigError, match="asks for 5 sequences; at most 4"):
        queue.enter(jobs(5, "a"))
    assert len(queue) == 0


def test_tokens_of_a_client_are_limited_but_for_one_request() -> None:
    queue, _ = queue_of(6, 6, tokens=25)
    queue.enter(jobs(1, "a", 30, 10))  # alone it may be as long as the context allows
    with pytest.raises(BusyError, match="40 tokens; at most 25"):
        queue.enter(jobs(1, "a", 1, 1))
    queue.enter(jobs(1, "b", 30, 10))
    queue.leave(jobs(1, "a", 30, 10))
    queue.enter(jobs(2, "a"))
    with pytest.raises(BusyError, match="20 tokens; at most 25"):
        queue.enter(jobs(1, "a", 1, 5))
    queue.enter(jobs(1, "a", 1, 4))


def test_retry_after_follows_how_often_sequences_end() -> None:
    queue, clock = queue_of(10, 10)
    queue.enter(jobs(10))
    clock.now += 8
    with pytest.raises(BusyError) as nothing_yet:
        queue.enter(jobs(2))
    assert nothing_yet.value.retry_after == 16, "none has ended in 8 seconds"
    for _ in range(4):
        clock.now += 2
        queue.leave(jobs(1))
        queue.enter(jobs(1))
    with pytest.raises(BusyError) as known:
        queue.enter(jobs(3))
    assert known.value.retry_after == 12, "four in 16 seconds, and three are needed"
    clock.now += 10_000
    with pytest.raises(BusyError, match="try again in 600 s"):
        queue.enter(jobs(3))


def test_a_key_that_fills_its_queue_leaves_the_other_its_rows(llm: LLM) -> None:
    Brake(llm.engine)
    with live_server(llm, api_keys=KEYS, max_queue=8) as live, live.client() as client:
        body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "n": 7, "stream": True}
        with client.stream("POST", "/v1/completions", json=body, headers=bearer(KEYS[0])):
            refused = completion(client, KEYS[0])
            assert refused.status_code == 429
            assert "your API key's" in refused.json()["error"]["message"]
            assert int(refused.headers["retry-after"]) >= 1
            assert len(live.server.llm.engine.running) == 3
            with client.stream("POST", "/v1/completions", json={**body, "n": 1}, headers=bearer(KEYS[1])) as other:
                assert other.status_code == 200


def test_defaults_leave_room_where_there_are_several_keys() -> None:
    shared = ServeSettings(model_name="x", api_keys=KEYS, max_queue=20)
    assert shared.seqs_per_key(16) == 12
    assert shared.room_per_key(16, 1000) == Room(num_sequences=12 + 10, num_tokens=64_000)
    for settings in (ServeSettings(model_name="x", max_queue=20), ServeSettings(model_name="x", api_keys=KEYS[:1])):
        assert settings.seqs_per_key(16) == 16
        assert settings.room_per_key(16, 1000) == Room(num_sequences=16 + settings.max_queue)
    own = ServeSettings(model_name="x", api_keys=KEYS, max_seqs_per_key=2, max_queue_per_key=0, max_tokens_per_key=50)
    assert own.seqs_per_key(16) == 2
    assert own.room_per_key(16, 1000) == Room(num_sequences=2, num_tokens=50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seqs_per_key": 0, "api_keys": KEYS}, "max_seqs_per_key is 0; it must be at least 1"),
        ({"max_queue_per_key": -1, "api_keys": KEYS}, "max_queue_per_key is -1; it must be at least 0"),
        ({"max_tokens_per_key": 0, "api_keys": KEYS}, "max_tokens_per_key is 0; it must be at least 1"),
        ({"max_queue_per_key": 3}, "no effect without API keys"),
    ],
)
def test_limits_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeSettings(model_name="x", **changes)


# -- seeds -------------------------------------------------------------------------------------------------------------


def test_seeded_texts_do_not_depend_on_history(tmp_path: Path) -> None:
    """The short form of benchmarks/seeds.py."""
    bodies = requests_of(30, 12)
    found = []
    for seed, (draft, batch, caching) in enumerate(
        [("none", 1, False), ("both", 1, True), ("both", 3, True), ("both", 16, True), ("both", 16, False)]
    ):
        llm = tiny_llm(tmp_path, draft, max_num_seqs=batch, prefix_caching=caching)
        with live_server(llm) as live:
            found.append(asyncio.run(history(live.url, bodies, seed, 2 * batch)))
        llm.close()
    assert differing(found, bodies) == []
    assert len({tuple(texts) for texts in found[0]}) > 20, "seeds and ways make a difference"


def test_a_choice_is_what_its_seed_alone_gives(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path, "both", max_num_seqs=4, prefix_caching=True)
    body = {"prompt": LONG_TEXT, "max_tokens": 12, "temperature": 1.0}
    with live_server(llm) as live, live.client() as client:
        together = client.post("/v1/completions", json={**body, "n": 3, "seed": 7}).json()["choices"]
        singly = [client.post("/v1/completions", json={**body, "seed": 7 + i}).json()["choices"][0] for i in (2, 0, 1)]
    assert [choice["text"] for choice in together] == [singly[i]["text"] for i in (1, 2, 0)]
