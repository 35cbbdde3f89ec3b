"""Drafted against plain decoding in turn, and tokens without what costs speed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from hopskip.serve.race import Race
from tests.serving import Live, live_server, tiny_llm

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi there"}],
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "return_tokens": "origins",
}
RACE: dict[str, Any] = CHAT | {"speculative": {"race": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with live_server(tiny_llm(folder)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[httpx.Client]:
    with live.client() as client:
        yield client


# -- turns -------------------------------------------------------------------------------------------------------------


def sequence() -> Any:
    return SimpleNamespace(tokens=["first"], is_prefilled=True, is_finished=False)


def test_turns_and_figures() -> None:
    drafted, plain = sequence(), sequence()
    race = Race([drafted, plain])
    assert race.figures(drafted) == {"num_tokens": 0, "seconds": 0.0, "speedup": None}
    order = ""
    for _ in range(8):
        resting = race.take_turn()
        moving = plain if resting is drafted else drafted
        order += "d" if moving is drafted else "p"
        moving.tokens += ["token"] * (3 if moving is drafted else 1)
        race.count(0.04 if moving is drafted else 0.02)
    # after one step the other begins; from then on one rests when it is more than 0.05 s ahead
    assert order == "dpppppdd"
    assert race.figures(drafted) == {"num_tokens": 9, "seconds": pytest.approx(0.12), "speedup": pytest.approx(75 / 50)}
    assert race.figures(plain) == {"num_tokens": 5, "seconds": pytest.approx(0.1), "speedup": pytest.approx(75 / 50)}
    assert race.take_turn() is plain
    race.count(0.04)
    assert race.take_turn() is drafted, "now the drafted one is ahead"


def test_turns_begin_when_both_have_their_first_token_and_end_when_one_has_ended() -> None:
    drafted: Any = sequence()
    plain: Any = sequence()
    race = Race([drafted, plain])
    for late, other in ((drafted, plain), (plain, drafted)):
        late.is_prefilled = False
        assert race.take_turn() is other, "who has read the prompt waits"
        race.count(9.0)
        late.is_prefilled = True
    for each in (drafted, plain):
        assert race.figures(each)["seconds"] == 0
    drafted.tokens += ["beside the other's prompt"] * 5
    assert race.take_turn() is plain
    drafted.tokens += ["counted"]
    race.count(0.01)
    assert race.figures(drafted)["num_tokens"] == 1
    assert not race.is_over
    winner: Any
    for winner in (drafted, plain):
        winner.is_finished = True
        assert race.is_over
        assert race.take_turn() is None
        winner.is_finished = False


# -- over HTTP ---------------------------------------------------------------------------------------------------------


def test_a_race(client: httpx.Client, live: Live) -> None:
    engine = live.server.llm.engine
    step, moves = engine.step, []

    def watched(*arguments: Any, **options: Any) -> None:
        before = {s: len(s.tokens) for s in engine.running}
        step(*arguments, **options)
        moves.append([before[s] > 0 and len(s.tokens) > before[s] for s in sorted(before, key=lambda s: s.number)])

    engine.step = watched  # type: ignore[method-assign]
    answer = client.post("/v1/chat/completions", json=RACE).json()
    engine.step = step  # type: ignore[method-assign]
    drafted, plain = answer["choices"]
    assert drafted["message"]["content"] == plain["message"]["content"]
    assert drafted["hopskip"]["stats"]["num_drafts"] > 0
    assert plain["hopskip"]["stats"]["num_drafts"] == 0
    assert {token["origin"] for token in plain["hopskip"]["tokens"]} == {"target"}
    both = [move for move in moves if len(move) == 2]
    assert [True, False] in both
    assert [True, True] not in both
    for choice in (drafted, plain):
        race = choice["hopskip"]["race"]
        assert 0 < race["num_tokens"] <= 23, "the first token is the prompt's"
        assert race["seconds"] > 0
        assert race["speedup"] is None or race["speedup"] > 0
    assert "race" not in client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["hopskip"]


def test_a_streamed_race_of_a_completion(client: httpx.Client) -> None:
    body = {k: v for k, v in RACE.items() if k != "messages"} | {"prompt": "Hi there", "stream": True}
    body["speculative"] = {"race": True, "num_draft_tokens": 2, "exit_layer": 1}
    texts: list[str] = ["", ""]
    figures: list[Any] = [{}, {}]
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
                    figures[choice["index"]] = choice["hopskip"]["race"]
    assert texts[0] == texts[1] != ""
    assert figures[0]["speedup"] == figures[1]["speedup"]


def test_others_go_on_beside_a_race(client: httpx.Client, live: Live) -> None:
    alone = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    with client.stream("POST", "/v1/chat/completions", json=RACE | {"stream": True, "max_tokens": 300}) as answer:
        next(answer.iter_lines())
        beside = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]["content"]
    assert beside == alone
    again = client.post("/v1/chat/completions", json=RACE).json()["choices"]
    assert [choice["message"]["content"] for choice in again] == [alone, alone], "also after one whose client has left"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2}, "leave out n"),
        ({"speculative": {"race": True, "enabled": False}}, "enabled=false leaves nothing to"),
        ({"speculative": {"race": True, "num_draft_tokens": 0}}, "no effect without drafts"),
        ({"speculative": {"race": "yes"}}, "boolean"),
    ],
)
def test_what_cannot_race(client: httpx.Client, body: Any, message: str) -> None:
    answer = client.post("/v1/chat/completions", json=RACE | body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_several_prompts_cannot_race(client: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "speculative": {"race": True}}
    assert "one prompt" in client.post("/v1/completions", json=body).json()["error"]["message"]


@pytest.mark.parametrize(("draft", "rows", "message"), [("none", 2, "without drafts"), ("ngram", 1, "room for one")])
def test_servers_that_cannot_race(folder: Path, draft: str, rows: int, message: str) -> None:
    with live_server(tiny_llm(folder, draft, max_num_seqs=rows)) as live, live.client() as client:
        answer = client.post("/v1/chat/completions", json=RACE)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]


def test_tokens_without_log_probabilities(client: httpx.Client) -> None:
    with_them = client.post("/v1/chat/completions", json=CHAT | {"return_tokens": True}).json()["choices"][0]
    without = client.post("/v1/chat/completions", json=CHAT).json()["choices"][0]
    for token, bare in zip(with_them["hopskip"]["tokens"], without["hopskip"]["tokens"], strict=True):
        assert len(token["top"]) == 5
        assert bare["top"] == []
        assert bare["logprob"] is None
        assert bare["id"] == token["id"]
    assert client.post("/v1/chat/completions", json=CHAT | {"return_tokens": "all"}).status_code == 400
