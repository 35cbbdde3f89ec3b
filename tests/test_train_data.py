"""Reading, tokenizing and packing of training data."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hopskip.errors import ConfigError
from hopskip.train.base import load_transformers_tokenizer
from hopskip.train.data import IGNORED, StreamedRows, collate, load_rows
from hopskip.train.encode import encode
from hopskip.train.read import DataConfig, read, read_split
from tests.tiny import CHAT_TEMPLATE, write_tokenizer

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog. It's 12:30, isn't it?", "hello, world"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_transformers_tokenizer(folder)


def write_lines(path: Path, rows: list[Any]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def texts(path: Path) -> str:
    return write_lines(path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_kinds_of_files(kind: str, tmp_path: Path) -> None:
    rows = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    assert list(read(str(path), DataConfig(train=("x",)))) == rows


def test_text_files_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n\nfile")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not data")
    data = DataConfig(train=("x",))
    assert list(read(str(tmp_path), data)) == [{"text": "first"}, {"text": "second\n\nfile"}]
    assert list(read(str(tmp_path / "b*"), data)) == [{"text": "second\n\nfile"}]


def test_hub_data_sets_are_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"text": "from the Hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read("someone/corpus", DataConfig(train=("x",), subset="small", split="validation")))
    assert rows == [{"text": "from the Hub"}]
    assert asked == [(("someone/corpus", "small"), {"split": "validation", "streaming": True})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("bad.jsonl", b"{]", "cannot be read"),
        ("bad.jsonl", b"[1]\n", r"entry 0 is \[1\], not an object"),
        ("bad.json", b"{}", "not a list of objects"),
        ("bad.jsonl.gz", b"not gzip", "cannot be read"),
        ("bad.txt", b"\xff\xfe\xff", "cannot be read"),
        ("data.csv", b"a,b", "of no known kind"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read(str(tmp_path / name), DataConfig(train=("x",))))


def test_rows_are_chosen_and_held_out(tmp_path: Path) -> None:
    rows = [{"text": str(n), "src": "ab"[n % 2]} for n in range(14)]
    data = DataConfig(train=(write_lines(tmp_path / "rows.jsonl", rows),), where={"src": "b"}, holdout_every=3)
    assert [row["text"] for row in read_split(data, held_out=True)] == ["1", "7", "13"]
    assert [row["text"] for row in read_split(data, held_out=False)] == ["3", "5", "9", "11"]


def learned_text(document: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode([i for i, is_on in zip(document.ids, document.learned, strict=True) if is_on]))


CHAT = [
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "Over whom?"},
    {"role": "assistant", "content": "The dog."},
]
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_assistant_tokens_by_rendering_prefixes(tokenizer: Any) -> None:
    document = encode({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    assert document.ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\nThe dog.<|im_end|>\n"


def test_assistant_tokens_by_generation_marks(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED_TEMPLATE
    try:
        document = encode({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>The dog.<|im_end|>"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    try:
        with pytest.raises(ConfigError, match="mark them in the template"):
            encode({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


def test_prompts_and_responses(tokenizer: Any) -> None:
    row = {"question": "Who jumps?", "answer": "The fox."}
    data = DataConfig(train=("x",), loss_on="assistant", prompt_field="question", response_field="answer")
    document = encode(row, data, tokenizer)
    assert document.ids == tokenizer.apply_chat_template(CHAT[:2], return_dict=False)
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\n"
    tokenizer.chat_template = None
    try:
        document = encode(row, data, tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.decode(document.ids) == "Who jumps?\nThe fox.<|im_end|>"
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>"


def test_a_prompt_may_be_a_chat_or_the_first_of_several_turns(tokenizer: Any) -> None:
    data = DataConfig(train=("x",))
    whole = tokenizer.apply_chat_template(CHAT[:2], return_dict=False)
    for prompt in ({"prompt": CHAT[:1]}, {"turns": [CHAT[0]["content"], "And then?"]}):
        assert encode({**prompt, "response": "The fox."}, data, tokenizer).ids == whole


@pytest.mark.parametrize(
    ("row", "loss_on", "message"),
    [
        ({"body": "text"}, "all", r"but \['body'\]"),
        ({"text": "plain"}, "assistant", "needs chats"),
        ({"messages": [{"content": "no role"}]}, "all", "role and content"),
    ],
)
def test_rows_that_cannot_be_used(row: Any, loss_on: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(row, DataConfig(train=("x",), loss_on=loss_on), tokenizer)


def documents(tokenizer: Any) -> list[list[int]]:
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def test_blocks_are_one_stream(tmp_path: Path, tokenizer: Any) -> None:
    data = DataConfig(train=(texts(tmp_path),), packing="blocks", max_length=7)
    rows = load_rows(data, tokenizer, 64)
    assert isinstance(rows, list)
    stream = list(itertools.chain(*documents(tokenizer)))
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == stream
    assert {len(row["input_ids"]) for row in rows[:-1]} == {7}
    for row in rows:
        assert row["labels"].tolist() == [IGNORED, *row["input_ids"].tolist()[1:]]


def test_documents_are_packed_whole(tmp_path: Path, tokenizer: Any) -> None:
    longest = max(map(len, documents(tokenizer)))
    data = DataConfig(train=(texts(tmp_path),), packing="documents", max_length=longest)
    rows = load_rows(data, tokenizer, 1024)
    assert isinstance(rows, list)
    assert len(rows) < len(TEXTS)
    found = []
    for row in rows:
        assert len(row["input_ids"]) <= longest
        starts = [*row["position_ids"].eq(0).nonzero().flatten().tolist(), len(row["input_ids"])]
        found += [row["input_ids"][a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert row["labels"][starts[:-1]].tolist() == [IGNORED] * (len(starts) - 1)
    assert found == documents(tokenizer)


@pytest.mark.parametrize("too_long", ["truncate", "drop", "split", "error"])
def test_documents_that_are_too_long(too_long: Any, tmp_path: Path, tokenizer: Any) -> None:
    data = DataConfig(train=(texts(tmp_path),), max_length=12, too_long=too_long)
    whole = documents(tokenizer)
    assert any(len(ids) > 12 for ids in whole)
    assert any(len(ids) <= 12 for ids in whole)
    if too_long == "error":
        with pytest.raises(ConfigError, match=r"tokens, but data.max_length is 12; raise it"):
            load_rows(data, tokenizer, 1024)
        return
    expected = {
        "truncate": [ids[:12] for ids in whole],
        "drop": [ids for ids in whole if len(ids) <= 12],
        "split": [part for ids in whole for part in (ids[i : i + 12] for i in range(0, len(ids), 12)) if len(part) > 1],
    }[too_long]
    assert [row["input_ids"].tolist() for row in load_rows(data, tokenizer, 1024)] == expected


def test_streaming_gives_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    settings: Any = {"train": (texts(tmp_path),), "packing": "blocks", "max_length": 9}
    rows = load_rows(DataConfig(**settings), tokenizer, 64)
    streamed = load_rows(DataConfig(**settings, streaming=True), tokenizer, 64)
    assert isinstance(streamed, StreamedRows)
    for _ in range(2):
        for row, expected in zip(streamed, rows, strict=True):
            assert all(torch.equal(row[name], expected[name]) for name in expected)


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_to_train_on(streaming: bool, tmp_path: Path, tokenizer: Any) -> None:
    data = DataConfig(train=(texts(tmp_path),), where={"src": "gsm8k"}, streaming=streaming)
    with pytest.raises(ConfigError, match=r"no rows .* where \{'src': 'gsm8k'\}"):
        load_rows(data, tokenizer, 1024)


def test_longer_than_the_context(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="max_length is 2048, but the model's context is 1024"):
        load_rows(DataConfig(train=(texts(tmp_path),), max_length=2048), tokenizer, 1024)


def test_padding() -> None:
    rows = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([IGNORED, 6, 7])}]
    rows.append({"input_ids": torch.tensor([8]), "labels": torch.tensor([IGNORED])})
    batch = collate(rows)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]
    assert "attention_mask" not in batch
    for row in rows:
        row["position_ids"] = torch.arange(len(row["input_ids"]))
    packed = collate(rows)
    assert "attention_mask" not in packed
    assert packed["position_ids"].tolist() == [[0, 1, 2], [0, 0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ()}, "names nothing"),
        ({"packing": "bins"}, "packing is 'bins'; choose one of none, blocks, documents"),
        ({"packing": "blocks", "too_long": "drop"}, "no effect with packing 'blocks'"),
        ({"eval": ("y",), "holdout_every": 5}, "leave one out"),
        ({"max_length": 1}, "max_length is 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"train": ("x",), **settings})
