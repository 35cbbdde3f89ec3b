"""Folders that have only sentencepiece's `tokenizer.model`, against the sentencepiece package itself."""

from __future__ import annotations

import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from benchmarks.odd_texts import make_texts

from hopskip.errors import CheckpointError
from hopskip.text.sentencepiece import PieceMerger
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from tests.test_tokenizer import CONFIG, TEXTS, pieces
from tests.tiny import CHAT_TEMPLATE, CORPUS, byte_level_tokenizer, write_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

CHATML = {
    "900": {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False},
    "901": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False},
    "902": {"content": "tool é", "special": False, "lstrip": True, "rstrip": True},
}


@cache
def model(**options: Any) -> bytes:
    """A vocabulary as Llama 2's: BPE, bytes for what is no piece, nothing normalized."""
    written = io.BytesIO()
    plain = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": "<user>",
        "minloglevel": 2,
    }
    lines = [
        line for text in (*CORPUS, *make_texts(300, 5, ())) for line in text.split("\n") if line and "\0" not in line
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, **{**plain, **options}
    )
    return written.getvalue()


def write(folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Write the folder; returns the package's own processor."""
    (folder / "tokenizer.model").write_bytes(model(**options))
    plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({**plain, **(settings or {})}))
    return sentencepiece.SentencePieceProcessor(model_proto=model(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"model_type": "unigram", "vocab_size": 800},
    ],
    ids=["llama", "no prefix", "normalized", "no bytes", "unigram"],
)
def test_ids_are_those_of_sentencepiece(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # nothing needs it
    processor = write(tmp_path, **options)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    for text in [*TEXTS, *make_texts(400, 0, ("<user>",)), " hello", "  hello  "]:
        if "<s>" in text or "</s>" in text:
            continue
        assert tokenizer.encode(text) == [1, *processor.encode(text)], repr(text)
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    if not options:
        for text in ("hello", " hello ", "a🙂b", "naïve 你好"):
            assert (
                tokenizer.decode(tokenizer.encode(text)) == "".join(pieces(tokenizer, tokenizer.encode(text))) == text
            )


@pytest.mark.parametrize(("legacy", "behind"), [(None, "▁the"), (True, "▁the"), (False, "the")])
def test_text_behind_special_tokens(legacy: bool | None, behind: str, tmp_path: Path) -> None:
    """As transformers had it with and without `legacy`: a space before the text there, or none."""
    processor = write(tmp_path, {"added_tokens_decoder": CHATML, **({} if legacy is None else {"legacy": legacy})})
    ids = range(processor.vocab_size())
    merger = PieceMerger([*map(processor.id_to_piece, ids)], [*map(processor.get_score, ids)], unk_id=0)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    assert merger.encode("▁the") == processor.encode("the") != merger.encode("the")
    then = merger.encode(behind)
    assert tokenizer.encode("the<s>the") == [1, *processor.encode("the"), 1, *then]
    assert tokenizer.encode("<|im_start|>the<|im_end|>", add_special_tokens=False) == [900, *then, 901]
    assert tokenizer.encode("the \n tool é  the") == [1, *processor.encode("the"), 902, *then]
    assert tokenizer.decode([900, 902, 901]) == "tool é"


def test_chat_and_ends(tmp_path: Path) -> None:
    processor = write(tmp_path, {"added_tokens_decoder": CHATML, "add_bos_token": False, "add_eos_token": True})
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    assert tokenizer.encode("the") == [*processor.encode("the"), 2]
    assert tokenizer.eos_token_ids == (2, 901)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert ids == [
        *(900, *processor.encode("user\nthe"), 901, *processor.encode("\n")),
        *(900, *processor.encode("assistant\n")),
    ]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model needs .*pip install 'hopskip\[sentencepiece\]'"):
        load_tokenizer(tmp_path, CONFIG)


@pytest.mark.parametrize("contents", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff"], ids=["empty", "tiktoken", "cut"])
def test_a_file_that_is_not_sentencepieces(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(contents)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not a sentencepiece model"):
        load_tokenizer(tmp_path, CONFIG)


@pytest.mark.parametrize("table", [{"x": {"content": "a"}}, {"9": {}}, {"9": "<a>"}, ["<a>"], {"9": {"content": 3}}])
def test_a_damaged_table_of_added_tokens(table: Any, tmp_path: Path) -> None:
    write(tmp_path, {"added_tokens_decoder": table})
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder in .*tokenizer_config\.json is not a table"):
        load_tokenizer(tmp_path, CONFIG)


def test_a_tokenizer_json_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    write_tokenizer(tmp_path)
    expected = Tokenizer(byte_level_tokenizer(), special_tokens={}, chat_template=None, eos_token_ids=())
    assert load_tokenizer(tmp_path, CONFIG).encode("hello") == expected.encode("hello")
