"""Tokenizers of GGUF files: the ids of llama.cpp, which are kept in a file."""

from __future__ import annotations

import json
import lzma
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from benchmarks.tokenizers_against_llama_cpp import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.errors import CheckpointError, PromptError
from hopskip.text.gguf_tokenizer import tokenizer_of_gguf
from hopskip.text.grammar import GrammarCompiler
from hopskip.text.pre_tokenizers import PRE_TOKENIZERS, REFUSED
from hopskip.text.sentencepiece import PieceMerger
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from tests.properties import examples
from tests.serving import MODEL, live_server
from tests.test_tokenizer import CONFIG, TEXTS, id_of, pieces
from tests.tiny import (
    SPECIAL_TOKENS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    make_model,
    write_gguf,
    write_tokenizer,
)

DATA = Path(__file__).parent / "data" / "llama_cpp_ids.json.xz"


# --- llama.cpp's ids --------------------------------------------------------------------------------------------------


@cache
def expected() -> dict[str, Any]:
    """Made by benchmarks/tokenizers_against_llama_cpp.py."""
    contents: dict[str, Any] = json.loads(lzma.decompress(DATA.read_bytes()))
    return contents


FILES = expected()["files"]


@cache
def vocabulary(name: str) -> tuple[dict[str, Any], Tokenizer]:
    metadata = dict(variants(*expected()["tables"]))[name]
    return metadata, tokenizer_of_gguf(Path("vocabulary.gguf"), metadata, CONFIG)


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    metadata, tokenizer = vocabulary(name)
    place, tokens = FILES.index(name), metadata["tokenizer.ggml.tokens"]
    for text, (answers, which) in zip(expected()["texts"], expected()["rows"], strict=True):
        theirs, ours = answers[which[place]], tokenizer.encode(text)
        assert ours == theirs, (text, [tokens[i] for i in ours], [tokens[i] for i in theirs])


def test_every_pre_tokenizer_is_compared() -> None:
    assert set(PRE_TOKENIZERS) <= set(FILES)
    assert not set(PRE_TOKENIZERS) & set(REFUSED)


@pytest.mark.parametrize("name", [name for name in FILES if "sentencepiece" in name])
def test_sentencepiece_texts_come_back(name: str) -> None:
    """Decoded, a text is itself, but for its special tokens and a space before it."""
    metadata, tokenizer = vocabulary(name)
    special = [
        token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        if kind in (2, 3, 4) or token == "</s>"
    ]
    texts = [text for text in expected()["texts"] if not any(token in text for token in special) and "▁" not in text]
    assert len(texts) > 200
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == "".join(pieces(tokenizer, ids)) == text


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_equals_the_folder(text: str, tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    write_tokenizer(tmp_path, backend)
    write_gguf(tmp_path / "m.gguf", make_model("llama3-gqa"), tokenizer=backend)
    ours, folder = load_tokenizer(tmp_path / "m.gguf", CONFIG), load_tokenizer(tmp_path, CONFIG)
    assert ours.encode(text) == folder.encode(text)
    assert ours.decode(ours.encode(text)) == folder.decode(folder.encode(text))


@pytest.mark.parametrize(
    ("pre", "add_bos_token", "adds"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_gguf_bos(pre: str, add_bos_token: bool | None, adds: bool, tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add_bos_token}
    write_gguf(tmp_path / "m.gguf", make_model("llama3-gqa"), tokenizer=byte_level_tokenizer(), metadata=metadata)
    assert (load_tokenizer(tmp_path / "m.gguf", CONFIG).encode("hello")[0] == 0) is adds


def test_gguf_end_of_turn_counts_as_eos(tmp_path: Path) -> None:
    """Files often name only the end of a document, while their chats end a turn with another token."""
    model = make_model("llama3-gqa")
    write_gguf(
        tmp_path / "m.gguf",
        model,
        tokenizer=byte_level_tokenizer(),
        metadata={"tokenizer.ggml.eos_token_id": SPECIAL_TOKENS.index("<|endoftext|>")},
    )
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.eos_token_ids == (2,)
    assert load_tokenizer(checkpoint.path, checkpoint.config).eos_token_ids == (2, 1)


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tokenizer.ggml.pre": "nextbpe"}, "pre-tokenizer 'nextbpe' is not supported; use the model's Hugging Face"),
        ({"tokenizer.ggml.pre": "gemma4"}, r"pre-tokenizer 'gemma4' is not supported \(its merges are on plain text\)"),
        ({"tokenizer.ggml.pre": None}, "does not name its pre-tokenizer.*Use a newer file"),
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.merges": None}, "tables are corrupt.*download it again"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "tables are corrupt"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tables are corrupt.*2 token types"),
        (
            {"tokenizer.ggml.model": "rwkv"},
            r"RWKV's vocabulary \('rwkv'\) is not supported; use the model's Hugging Face",
        ),
        ({"tokenizer.ggml.model": "t5"}, r"Unigram vocabulary \('t5'\) is not supported"),
        ({"tokenizer.ggml.model": "bert"}, r"WordPiece vocabulary \('bert'\) is not supported"),
        ({"tokenizer.ggml.model": "next"}, "vocabulary 'next' is not supported"),
        ({"tokenizer.ggml.model": None}, "vocabulary None is not supported"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]}, "tables are corrupt.*1 scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["x"] * 600}, "tables are corrupt"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [1, 2]}, "tables are corrupt"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.token_type": 3}, "tables are corrupt"),
    ],
)
def test_gguf_without_a_usable_tokenizer(metadata: dict[str, Any], named: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama3-gqa"), tokenizer=byte_level_tokenizer(), metadata=metadata)
    with pytest.raises(CheckpointError, match=named):
        load_tokenizer(tmp_path / "m.gguf", CONFIG)


def test_a_merge_that_comes_twice_has_the_rank_of_the_first(tmp_path: Path) -> None:
    tokens = ["a", "b", "c", "ab", "bc"]
    for merges, ids in ((["a b", "b c"], [3, 2]), (["a b", "b c", "a b"], [3, 2]), (["b c", "a b"], [0, 4])):
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
        }
        assert tokenizer_of_gguf(tmp_path, metadata, CONFIG).encode("abc") == ids


@pytest.mark.parametrize("name", ["sentencepiece", "qwen2"])
def test_other_packages_are_not_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing transformers takes longer than all the rest of a start."""
    for package in ("transformers", "sentencepiece"):
        monkeypatch.setitem(sys.modules, package, None)
    metadata, _ = vocabulary(name)
    assert tokenizer_of_gguf(Path("m.gguf"), metadata, CONFIG).encode("a")


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """As in Llama 2's files."""
    ids = json.loads(byte_fallback_tokenizer().to_str())["model"]["vocab"]
    tokens = sorted(ids, key=lambda token: ids[token])
    plain = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {key: value for key, value in {**plain, **changes}.items() if value is not None}


def sentencepiece(**changes: Any) -> Tokenizer:
    return tokenizer_of_gguf(Path("m.gguf"), sentencepiece_metadata(**changes), CONFIG)


def test_a_sentencepiece_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha"), metadata=sentencepiece_metadata())
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    folder = Tokenizer(byte_fallback_tokenizer(), special_tokens={}, chat_template=None, eos_token_ids=())
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for text in [
        "hello é 🙂",
        " hello",
        "  hello  hello ",
        "<s>hello</s>hello</s> hello<s>",
        "",
        " ",
        "hellohello",
        *TEXTS,
    ]:
        for add in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=add)
            assert ids == folder.encode(text, add_special_tokens=add), text
            assert tokenizer.decode(ids) == folder.decode(ids) == "".join(pieces(tokenizer, ids))


def test_settings_of_sentencepiece_files() -> None:
    hello, spaced = 293, 294
    assert sentencepiece().encode("hello<s>hello") == [1, spaced, 1, spaced]
    no_prefix = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})
    assert no_prefix.encode("hello<s>hello hello") == [1, hello, 1, hello, spaced]
    assert no_prefix.decode([spaced, spaced]) == " hello hello"
    assert sentencepiece(**{"tokenizer.ggml.add_bos_token": False}).encode("hello") == [spaced]
    assert sentencepiece(**{"tokenizer.ggml.add_eos_token": True}).encode("hello") == [1, spaced, 2]
    unsaid = {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
    assert sentencepiece(**unsaid, **{"tokenizer.ggml.add_eos_token": True}).encode("hello") == [1, spaced, 2]
    assert sentencepiece(**unsaid).eos_token_ids == (2,)
    beyond = {"tokenizer.ggml.bos_token_id": 10**6}
    assert sentencepiece(**beyond).encode("hello") == [1, spaced]
    assert sentencepiece(**{"tokenizer.ggml.scores": None}).encode("hello")[0] == 1


@pytest.mark.parametrize(
    "token",
    [
        *("<|im_end|>", "[e~[", "▁<PRE>", "<MID>", "<|fim_middle|>", "<fim-pad>", "<fim_suffix>", "<|code_prefix|>"),
        *("<|suffix|>", "<\uff5cfim▁hole\uff5c>", "<REPO>", "[PAD]"),
    ],
)
def test_tokens_that_are_special_whatever_the_file_says(token: str) -> None:
    """llama.cpp knows them by their text."""
    plain = sentencepiece_metadata()
    added = {
        "tokenizer.ggml.tokens": [*plain["tokenizer.ggml.tokens"], token, "<|other|>"],
        "tokenizer.ggml.token_type": [*plain["tokenizer.ggml.token_type"], 1, 1],
        "tokenizer.ggml.scores": [*plain["tokenizer.ggml.scores"], -1000.0, -1000.0],
    }
    tokenizer = sentencepiece(**added)
    ids = tokenizer.encode(f"hello{token}hello<|other|>")
    assert ids[:4] == [1, 294, 296, 294]
    assert 297 not in ids
    assert tokenizer.decode(ids) == "hello hello<|other|>"


def test_a_lone_surrogate_is_no_text() -> None:
    with pytest.raises(PromptError, match="not valid text"):
        sentencepiece().encode("lone \ud800 surrogate")


def merge_plainly(scores: dict[str, float], text: str) -> list[str]:
    """The rule by itself: the best pair of neighbours is merged, of equals the leftmost, until none is a piece."""
    symbols = list(text)
    while True:
        pairs = [a + b for a, b in pairwise(symbols)]
        found = [(scores[pair], -place) for place, pair in enumerate(pairs) if pair in scores]
        if not found:
            return symbols
        place = -max(found)[1]
        symbols[place : place + 2] = [pairs[place]]


@settings(max_examples=examples(2))
@given(
    longer=st.dictionaries(st.text("ab▁", min_size=2, max_size=5), st.integers(-4, 0), max_size=25),
    text=st.text("ab▁c", max_size=30),
)
def test_pieces_are_merged_by_the_rule(longer: dict[str, float], text: str) -> None:
    """Equal scores, overlapping pieces (`aba` in `ababa`), spaces within a piece, a character that is no piece."""
    scores = {"?": 0.0, "a": -9.0, "b": -9.0, "▁": -9.0, **longer}
    names = list(scores)
    merger = PieceMerger(names, list(scores.values()), unk_id=0)
    expected_pieces = [piece if piece in scores else "?" for piece in merge_plainly(scores, text)]
    unknown_once = [
        p for p, before in zip(expected_pieces, ["", *expected_pieces], strict=False) if (p, before) != ("?", "?")
    ]
    assert [names[index] for index in merger.encode(text)] == unknown_once


def test_long_words_are_not_kept() -> None:
    merger = PieceMerger(["?", "a", "aa"], [0.0, -1.0, -2.0], unk_id=0)
    assert merger.encode("aaa" + "a" * 1000 + "▁aaa▁aaa") == [2] * 501 + [1, 0, 2, 1, 0, 2, 1]
    assert merger._merge.cache_info().currsize == 1


# --- Through the model ------------------------------------------------------------------------------------------------


def test_generated_text_continues_the_prompt(tmp_path: Path) -> None:
    """From `LLM` and from the server: the space before the first word that follows a prompt is part of the text."""
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha"), metadata=sentencepiece_metadata())
    llm = LLM(tmp_path / "m.gguf", backend="torch", speculative=SpeculativeConfig(draft="none"))
    params = SamplingParams(max_new_tokens=2, logit_bias={294: 100.0}, stop=("hello hello",))
    for prompt in ("hello", [1, 294], "<s>hello</s><s>"):
        assert llm.generate(prompt, params)[0].text == " "
        ids = llm.encode(prompt)
        plain = SamplingParams(max_new_tokens=2, logit_bias={294: 100.0})
        text = "".join(piece.text for piece in llm.stream(prompt, plain))
        assert text == " hello hello"
        assert llm.tokenizer.decode(ids) + text == llm.tokenizer.decode([*ids, 294, 294])
    with live_server(llm) as live, live.client() as client:
        request = {"model": MODEL, "max_tokens": 2, "temperature": 0, "logit_bias": {"294": 100}, "echo": True}
        for prompt in ("hello", [1, 294]):
            answer = client.post("/v1/completions", json={**request, "prompt": prompt}).json()
            assert answer["choices"][0]["text"] == "hello hello hello"


def test_grammars_know_sentencepiece_tokens() -> None:
    pytest.importorskip("llguidance")
    tokenizer = sentencepiece()
    compiler = GrammarCompiler(tokenizer, len(sentencepiece_metadata()["tokenizer.ggml.tokens"]))
    constraint = compiler.compile("regex", " hello (ab|é🙂)!")
    for token_id in tokenizer.encode("hello é🙂!")[1:]:
        assert constraint.num_allowed([token_id]) == 1
        constraint.accept(token_id)
    assert constraint.num_allowed([id_of(tokenizer, "a")]) == 0
    assert constraint.is_complete
