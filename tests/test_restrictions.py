"""Texts that may not end early, texts that are kept away, special tokens: alike with drafts and without."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hopskip import LLM, ConfigError, SamplingParams, SpeculativeConfig
from hopskip.engine.restrictions import AllOf, MinTokens
from hopskip.text.banned import Bans
from hopskip.text.tokenizer import TextStream
from tests.serving import tiny_llm
from tests.tiny import SPECIAL_TOKENS, VOCAB_SIZE

PROMPT = "The quick brown fox"
DRAWN = {"temperature": 1.0, "seed": 5}
LENGTH = 24


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    folder = tmp_path_factory.mktemp("model")
    llms = {draft: tiny_llm(folder, draft) for draft in ("none", "both", "early-exit")}
    tree = SpeculativeConfig(draft="early-exit", exit_layer=2, num_draft_tokens=4, num_runner_ups=3)
    return {**llms, "tree": LLM(folder, backend="native", speculative=tree)}


def ids(llm: LLM, **params: Any) -> list[int]:
    return llm.generate(PROMPT, max_tokens=LENGTH, use_tqdm=False, **params)[0].token_ids


def allowed(mask_W: Any) -> set[int]:
    bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little", count=VOCAB_SIZE)
    return set(np.flatnonzero(bits).tolist())


# -- an end that must wait ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("draft", ["none", "both", "early-exit", "tree"])
def test_no_end_before_so_many_tokens(llms: dict[str, LLM], draft: str, how: dict[str, Any]) -> None:
    plain, llm = llms["none"], llms[draft]
    free = ids(plain, ignore_eos=True, **how)
    place = next(i for i in range(4, LENGTH) if free[i] not in free[:i])
    ends: dict[str, Any] = {"stop_token_ids": [free[place]], "ignore_eos": True, **how}
    assert ids(llm, **ends) == ids(llm, min_tokens=place, **ends) == free[: place + 1]
    held_back = ids(llm, min_tokens=LENGTH, **ends)
    assert held_back == ids(plain, logit_bias={free[place]: -math.inf}, ignore_eos=True, **how)
    one_more = ids(llm, min_tokens=place + 1, **ends)
    assert one_more[: place + 1] == held_back[: place + 1]
    assert one_more == ids(plain, min_tokens=place + 1, **ends)


def test_the_models_own_end_waits_too(llms: dict[str, LLM]) -> None:
    [eos] = llms["none"].tokenizer.eos_token_ids
    for llm in llms.values():
        bias = {eos: 100.0}
        assert ids(llm, logit_bias=bias) == [eos]
        assert ids(llm, logit_bias=bias, min_tokens=3)[3:] == [eos]


def test_a_grammar_ends_a_text_all_the_same(llms: dict[str, LLM]) -> None:
    for llm in llms.values():
        [result] = llm.generate(PROMPT, regex="ab", max_tokens=9, min_tokens=7, use_tqdm=False)
        assert (result.text, result.finish_reason) == ("ab", "stop")
        [result] = llm.generate(
            PROMPT, regex="a+b?", max_tokens=20, min_tokens=7, temperature=1, seed=1, use_tqdm=False
        )
        assert len(result.token_ids) >= 7


def test_masks_of_min_tokens() -> None:
    constraint = MinTokens(2, [3, 70], 80)
    everything = set(range(80))

    def rows(draft: list[int], parents: list[int] | None = None) -> list[set[int]]:
        found = [np.unpackbits(m.view(np.uint8), bitorder="little", count=80) for m in constraint.masks(draft, parents)]
        return [everything - set(np.flatnonzero(row).tolist()) for row in found]

    assert rows([1, 2, 4]) == [{3, 70}, {3, 70}, set(), set()]
    assert rows([1, 2, 4], [-1, -1, 0]) == [{3, 70}, {3, 70}, {3, 70}, set()]
    assert [constraint.num_allowed(draft) for draft in ([], [3], [1, 70], [1, 2, 3], [1, 2])] == [0, 0, 1, 3, 2]
    constraint.accept(1)
    assert rows([1]) == [{3, 70}, set()]
    assert constraint.num_allowed([1, 3]) == 2
    constraint.accept(1)
    assert rows([]) == [set()]
    assert constraint.num_allowed([3]) == 1
    assert not constraint.is_complete


def test_where_nothing_is_left_the_first_decides() -> None:
    first, second = MinTokens(1, range(5, 32), 32), MinTokens(1, range(5), 32)
    both = AllOf([first, MinTokens(1, [2], 32)])
    assert both.masks([]).tolist() == [[0b11011]]
    assert AllOf([first, second]).masks([]).tolist() == first.masks([]).tolist()
    assert both.num_allowed([4, 2]) == 2
    assert both.num_allowed([2, 4]) == 0
    both.accept(4)
    assert both.masks([]).tolist() == [[2**32 - 1]]


class Pieces:
    def push(self, token_id: int) -> str:
        return "abcdefgh"[token_id]

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("min_tokens", "stop", "num_pushed", "text"),
    [
        (0, ("b",), 2, "a"),
        (1, ("b",), 2, "a"),
        (2, ("b",), 8, "abcdefgh"),
        (2, ("bc",), 3, "a"),
        (3, ("bc", "ef"), 6, "abcd"),
        (8, ("h",), 8, "abcdefgh"),
    ],
)
def test_stop_texts_wait_too(min_tokens: int, stop: tuple[str, ...], num_pushed: int, text: str) -> None:
    stream = TextStream(Pieces(), stop, min_tokens=min_tokens)
    pushed = next((i + 1 for i in range(8) if stream.push(i)), 8)
    stream.finish()
    assert (pushed, stream.text) == (num_pushed, text)


# -- texts that are kept away ------------------------------------------------------------------------------------------


def completing(llm: LLM, text: bytes, words: list[str]) -> set[int]:
    """Tokens that would complete one of the words behind a text, found by trying all."""
    found = set()
    for token_id in range(VOCAB_SIZE):
        longer = text + (b"" if llm.tokenizer.is_silent(token_id) else llm.tokenizer.token_bytes(token_id))
        if any(word.encode() in longer[max(0, len(text) - len(word.encode()) + 1) :] for word in words):
            found.add(token_id)
    return found


@pytest.mark.parametrize("draft", ["none", "both", "early-exit", "tree"])
def test_texts_are_kept_away(llms: dict[str, LLM], draft: str) -> None:
    llm = llms[draft]
    for how in ({}, DRAWN, {"temperature": 1.0, "seed": 8}):
        free = llm.generate(PROMPT, max_tokens=LENGTH, ignore_eos=True, use_tqdm=False, **how)[0].text  # type: ignore[arg-type]
        words = [free[3:5], free[9:10], free[14:17]]
        prompt_ids = llm.encode(PROMPT)
        expected: list[int] = []
        for _ in range(LENGTH if not how else 0):  # one token after the other, those that complete a word ruled out
            text = b"".join(map(llm.tokenizer.token_bytes, expected))
            bias = dict.fromkeys(completing(llm, text, words), -math.inf)
            [step] = llms["none"].generate(
                [prompt_ids + expected], max_tokens=1, logit_bias=bias, ignore_eos=True, use_tqdm=False
            )
            expected += step.token_ids
        params: dict[str, Any] = {
            "max_tokens": LENGTH,
            "ignore_eos": True,
            "bad_words": words,
            "use_tqdm": False,
            **how,
        }
        [result] = llm.generate(PROMPT, **params)
        assert result.token_ids == (expected or llms["none"].generate(PROMPT, **params)[0].token_ids)
        assert not any(word.encode() in b"".join(map(llm.tokenizer.token_bytes, result.token_ids)) for word in words)
        assert any(word in free for word in words)


def test_masks_of_banned_texts(llms: dict[str, LLM]) -> None:
    """Against all tokens, one by one, behind random texts of likely letters."""
    llm = llms["none"]
    bans = Bans(llm.tokenizer, VOCAB_SIZE)
    rng = random.Random(1)
    letters = [i for i in range(VOCAB_SIZE) if set(llm.tokenizer.token_bytes(i)) <= set(b"he quo\xc3\xbc")]
    for words in (["h"], ["he", "que"], ["hehe", "ü", "q u"], ["the quick"]):
        for _ in range(8):
            constraint = bans.constraint(tuple(words))
            taken = rng.choices(letters, k=rng.randrange(6))
            for token in taken:
                constraint.accept(token)
            draft = rng.choices(letters, k=2)
            texts = [b"".join(map(bans.bytes_of, [*taken, *draft[:n]])) for n in range(3)]
            masks = constraint.masks(draft)
            for mask, text in zip(masks, texts, strict=True):
                assert allowed(mask) == set(range(VOCAB_SIZE)) - completing(llm, text, words) - {
                    i for i in range(3) if any(word in SPECIAL_TOKENS[i] for word in words)
                }
            forbidden = [token not in allowed(mask) for token, mask in zip(draft, masks, strict=False)]
            assert constraint.num_allowed(draft) == (forbidden.index(True) if True in forbidden else 2)
            tree = constraint.masks([draft[0], draft[1]], [-1, -1])
            assert (tree[1] == masks[1]).all()
            assert not constraint.is_complete


def test_special_tokens_can_be_kept_away_by_name(llms: dict[str, LLM]) -> None:
    llm = llms["none"]
    [eos] = llm.tokenizer.eos_token_ids
    assert eos not in ids(llm, logit_bias={eos: 100.0}, bad_words=["<|im_end|>"])


# -- special tokens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["none", "both"])
def test_special_tokens_show_and_stop(llms: dict[str, LLM], draft: str) -> None:
    llm = llms[draft]
    special = llm.tokenizer.encode("<|endoftext|>")
    assert [llm.tokenizer.special_id(text) for text in ("<|endoftext|>", "e", "<|endoftext", "")] == [
        *special,
        None,
        None,
        None,
    ]
    params: dict[str, Any] = {"logit_bias": {special[0]: 100.0}, "max_tokens": 3, "use_tqdm": False}
    for skip, text in (True, ""), (False, "<|endoftext|>" * 3):
        [result] = llm.generate(PROMPT, skip_special_tokens=skip, **params)
        assert (result.text, result.token_ids) == (text, special * 3)
        pieces = [
            piece.text
            for piece in llm.stream(PROMPT, logit_bias={special[0]: 100.0}, max_tokens=3, skip_special_tokens=skip)
        ]
        assert "".join(pieces) == text
        [result] = llm.generate(PROMPT, skip_special_tokens=skip, stop="<|endoftext|>", **params)
        assert (result.text, result.token_ids, result.finish_reason) == ("", special, "stop")
    assert llm.tokenizer.decode([*special, *llm.tokenizer.encode("a")]) == "a"
    assert llm.tokenizer.decode([*special, *llm.tokenizer.encode("a")], skip_special_tokens=False) == "<|endoftext|>a"


# -- what may be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min_tokens": -1}, "min_tokens is -1; it must be 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, above max_tokens, which is 8; lower it"),
        ({"min_tokens": 257}, "min_tokens is 257, above max_new_tokens, which is 256; lower it"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1, or ask for prompt_logprobs"),
        ({"bad_words": [""]}, "bad_words is"),
        ({"bad_words": 5}, "bad_words is 5; it must be a text or a list of texts"),
        ({"skip_special_tokens": 1}, "skip_special_tokens is 1; it must be True or False"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must be None, 0 or"),
    ],
)
def test_wrong_values(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**given)


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.min_tokens, params.bad_words, params.skip_special_tokens, params.prompt_logprobs) == (
        0,
        (),
        True,
        None,
    )
    assert SamplingParams(bad_words="a").bad_words == ("a",)
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8


def test_the_command_line_has_them(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hopskip.cli import app

    tiny_llm(tmp_path)
    base = [
        "generate",
        "-m",
        str(tmp_path),
        "--raw",
        "--quiet",
        "--threads",
        "1",
        "--draft",
        "none",
    ]

    def text(*options: str) -> str:
        result = CliRunner().invoke(app, [*base, "-n", "12", *options, PROMPT])
        assert result.exit_code == 0, result.output
        return result.stdout

    free = text("--min-tokens", "12")
    assert text("--min-tokens", "12", "--skip-special-tokens") == free
    assert free[2] not in text(
        "--min-tokens", "12", "--bad-words", free[2], "--bad-words", free[4], "--no-skip-special-tokens"
    )
