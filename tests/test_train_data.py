"""Reading, tokenizing and packing of training data."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.utils.data import DataLoader

from hopskip.errors import ConfigError
from hopskip.train.base import load_transformers_tokenizer
from hopskip.train.data import IGNORED, StreamedRows, collate, load_rows, make_rows
from hopskip.train.encode import Document, encode
from hopskip.train.read import DataConfig, LossOn, check_sources, read, read_split
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


def encode_one(row: Any, data: DataConfig, tokenizer: Any) -> Document:
    (document,) = encode(row, data, tokenizer)
    return document


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
        ("data.xls", b"a,b", "of no known kind"),
    ],
)
def test_bad_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read(str(tmp_path / name), DataConfig(train=("x",))))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "txt"])
def test_a_byte_order_mark_is_not_text(kind: str, tmp_path: Path) -> None:
    texts = {"jsonl": '{"text": "Köln"}\n', "json": '[{"text": "Köln"}]', "txt": "Köln"}
    content = b"\xef\xbb\xbf" + texts[kind.removesuffix(".gz")].encode()
    (tmp_path / f"rows.{kind}").write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert list(read(str(tmp_path / f"rows.{kind}"), DataConfig(train=("x",)))) == [{"text": "Köln"}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # older `datasets` leave files open
def test_tables_and_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "2 + 2?", "response": "4, I think"}, {"prompt": "3, 4", "response": "seven"}]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "rows.csv")
    table.save_to_disk(tmp_path / "saved")
    for place in (tmp_path / "rows.csv", tmp_path / "saved", *(tmp_path / "saved").glob("*.arrow")):
        assert list(read(str(place), DataConfig(train=("x",)))) == rows


def test_sources_are_looked_for_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_lines(tmp_path / "rows.jsonl", [{"text": "x"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{]")
    check_sources(DataConfig(train=(good, str(tmp_path)), eval=(str(broken),)))
    with pytest.raises(ConfigError, match=r"missing\.jsonl.*no such file"):
        check_sources(DataConfig(train=(good,), eval=("missing.jsonl",)))
    asked = []

    def load_dataset(name: str, *arguments: Any, **options: Any) -> Any:
        asked.append(name)
        yield {}

    monkeypatch.setattr("hopskip.train.read._load_dataset", load_dataset)
    check_sources(DataConfig(train=("someone/corpus",)))
    assert asked == ["someone/corpus"]


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
    document = encode_one({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    assert document.ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\nThe dog.<|im_end|>\n"


def test_assistant_tokens_by_generation_marks(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED_TEMPLATE
    try:
        document = encode_one({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>The dog.<|im_end|>"


LAST_THOUGHT_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + (message['thought'] or '') + '</think>\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: thoughts are kept for what follows the last question only."""


def test_templates_that_rewrite_earlier_turns(tokenizer: Any) -> None:
    """The chat as a whole, and again up to every turn that it writes otherwise: each answer is learned once, after the
    text that the model would have had before it."""
    data = DataConfig(train=("x",), loss_on="assistant")
    chat = [CHAT[0], {**CHAT[1], "thought": "Hm. "}, *CHAT[2:]]
    tokenizer.chat_template = LAST_THOUGHT_TEMPLATE
    try:
        found = encode({"messages": chat}, data, tokenizer)
        asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        one_turn = encode({"messages": chat[:2]}, data, tokenizer)
        everything = encode({"messages": chat}, DataConfig(train=("x",)), tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert [learned_text(document, tokenizer) for document in found] == [
        "<think>\n</think>\nThe dog.<|im_end|>\n",
        "<think>\nHm. </think>\nThe fox.<|im_end|>\n",
    ]
    assert tokenizer.decode(found[0].ids) == whole
    assert tokenizer.decode(found[1].ids).startswith(asked)
    assert one_turn == found[1:]
    assert [tokenizer.decode(document.ids) for document in everything] == [whole]


def test_an_opening_that_is_not_kept(tokenizer: Any) -> None:
    """A generation prompt that opens thoughts, which the template drops from what was said."""
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    try:
        document = encode_one({"messages": CHAT}, DataConfig(train=("x",), loss_on="assistant"), tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\nThe dog.<|im_end|>\n"


def test_the_assistant_may_begin(tokenizer: Any) -> None:
    data = DataConfig(train=("x",), loss_on="assistant")
    document = encode_one({"messages": [CHAT[1], CHAT[2], CHAT[3]]}, data, tokenizer)
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\nThe dog.<|im_end|>\n"
    tokenizer.chat_template = CHAT_TEMPLATE.partition("{% if add")[0]  # nothing asks for an answer
    try:
        document = encode_one({"messages": [CHAT[1]]}, data, tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert learned_text(document, tokenizer) == "<|im_start|>assistant\nThe fox.<|im_end|>\n"
    assert not any(encode_one({"messages": [CHAT[0]]}, data, tokenizer).learned)


def test_tools_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join(',') if tools }}" + CHAT_TEMPLATE
    try:
        functions: list[Any] = [{"name": "add"}, {"name": "sum"}]
        for tools in (functions, json.dumps(functions)):
            for loss_on in get_args(LossOn):
                row = {"messages": CHAT[:2], "tools": tools}
                document = encode_one(row, DataConfig(train=("x",), loss_on=loss_on), tokenizer)
                assert tokenizer.decode(document.ids).startswith("add,sum<|im_start|>user")
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    for wrong, message in (("{", "not JSON"), ({"name": "add"}, "give a list of functions")):
        with pytest.raises(ConfigError, match=message):
            encode({"messages": CHAT, "tools": wrong}, DataConfig(train=("x",)), tokenizer)


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
    document = encode_one(row, data, tokenizer)
    assert document.ids == tokenizer.apply_chat_template(CHAT[:2], return_dict=False)
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>\n"
    tokenizer.chat_template = None
    try:
        document = encode_one(row, data, tokenizer)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.decode(document.ids) == "Who jumps?\nThe fox.<|im_end|>"
    assert learned_text(document, tokenizer) == "The fox.<|im_end|>"


def test_a_prompt_may_be_a_chat_or_the_first_of_several_turns(tokenizer: Any) -> None:
    data = DataConfig(train=("x",))
    whole = tokenizer.apply_chat_template(CHAT[:2], return_dict=False)
    for prompt in ({"prompt": CHAT[:1]}, {"turns": [CHAT[0]["content"], "And then?"]}):
        assert encode_one({**prompt, "response": "The fox."}, data, tokenizer).ids == whole


@pytest.mark.parametrize(
    ("row", "loss_on", "message"),
    [
        ({"body": "text"}, "all", r"but \['body'\]"),
        ({"text": "plain"}, "assistant", "needs chats"),
        ({"messages": [{"content": "no role"}]}, "all", "role and content"),
        ({"messages": "Hi"}, "all", "a chat is a list of objects with role and content, not 'Hi'"),
        ({"conversations": [{"from": "human"}]}, "all", "but one is {'from': 'human'}"),
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


def identities(rows: Any) -> list[int]:
    return sorted(int(row["input_ids"][0]) * 1000 + int(row["input_ids"][1]) for row in rows)


def numbered(path: Path, number: int, **settings: Any) -> DataConfig:
    """A stream of distinct rows."""
    rows = [{"text": chr(33 + n // 90) + chr(33 + n % 90)} for n in range(number)]
    return DataConfig(train=(write_lines(path / "numbered.jsonl", rows),), streaming=True, **settings)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_every_streamed_row_comes_once(num_workers: int, tmp_path: Path, tokenizer: Any) -> None:
    rows = load_rows(numbered(tmp_path, 40), tokenizer, 1024)
    assert isinstance(rows, StreamedRows)
    loader = DataLoader(rows, batch_size=4, collate_fn=list, num_workers=num_workers)
    expected = identities(rows)
    assert len(set(expected)) == 40
    assert identities(itertools.chain(*loader)) == expected


@pytest.mark.parametrize(("num_ranks", "num_workers", "shuffle_buffer"), [(1, 0, None), (2, 0, 5), (3, 2, 4)])
def test_ranks_and_workers_share_a_stream(
    num_ranks: int, num_workers: int, shuffle_buffer: int | None, tmp_path: Path, tokenizer: Any
) -> None:
    """Every pass has each row once, whatever the number of readers, and none of them ends before another."""
    rows = load_rows(numbered(tmp_path, 42, shuffle_buffer=shuffle_buffer), tokenizer, 1024)
    assert isinstance(rows, StreamedRows)
    streams = [
        iter(
            DataLoader(
                rows.endless(rank=rank, num_ranks=num_ranks, seed=7),
                batch_size=None,
                collate_fn=None,
                num_workers=num_workers,
            )
        )
        for rank in range(num_ranks)
    ]
    share = 42 // num_ranks
    first, second = ([list(itertools.islice(stream, share)) for stream in streams] for _ in range(2))
    assert identities(itertools.chain(*first)) == identities(itertools.chain(*second)) == identities(rows)
    orders = [[int(row["input_ids"][1]) for row in made[0]] for made in (first, second)]
    assert (orders[0] == orders[1]) == (shuffle_buffer is None)
    if shuffle_buffer is None:
        assert orders[0] == [int(row["input_ids"][1]) for row in rows]
    again = DataLoader(
        rows.endless(rank=0, num_ranks=num_ranks, seed=7), batch_size=None, collate_fn=None, num_workers=num_workers
    )
    assert [int(row["input_ids"][1]) for row in itertools.islice(again, share)] == orders[0]


def test_a_buffer_shuffles_near_rows_by_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_rows(numbered(tmp_path, 40, shuffle_buffer=6), tokenizer, 1024)
    assert isinstance(rows, StreamedRows)
    plain = [int(row["input_ids"][1]) for row in rows]
    orders = {}
    for seed in (1, 2):
        stream = rows.endless(rank=0, num_ranks=1, seed=seed)
        orders[seed] = [int(row["input_ids"][1]) for row in itertools.islice(stream, 40)]
        for position, value in enumerate(orders[seed]):
            assert plain.index(value) < position + 6  # none comes from further ahead than the buffer reaches
    assert orders[1] != orders[2]
    assert orders[1] != plain


def test_more_readers_than_documents(tmp_path: Path, tokenizer: Any) -> None:
    rows = load_rows(numbered(tmp_path, 3), tokenizer, 1024)
    assert isinstance(rows, StreamedRows)
    assert len(list(itertools.islice(rows.endless(rank=2, num_ranks=3, seed=0), 4))) == 4
    with pytest.raises(ConfigError, match=r"4 readers \(ranks x training.dataloader_num_workers\) share the data"):
        next(iter(rows.endless(rank=3, num_ranks=4, seed=0)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["blocks", "none", "documents"])
def test_a_corpus_of_one_document(packing: Any, streaming: bool, tmp_path: Path, tokenizer: Any) -> None:
    """Its rows are held out, none of which is trained on."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    too_long: Any = "error" if packing == "blocks" else "split"
    data = DataConfig(train=(str(tmp_path),), packing=packing, max_length=16, too_long=too_long, holdout_every=5)
    whole = load_rows(replace(data, holdout_every=None), tokenizer, 1024)
    train = load_rows(replace(data, streaming=streaming), tokenizer, 1024)
    held_out = load_rows(data, tokenizer, 1024, held_out=True)
    assert isinstance(whole, list)
    assert isinstance(held_out, list)
    ids = [row["input_ids"].tolist() for row in whole]
    assert len(ids) > 10
    assert [row["input_ids"].tolist() for row in held_out] == ids[::5]
    assert [row["input_ids"].tolist() for row in train] == [row for n, row in enumerate(ids) if n % 5]
    if streaming:
        assert isinstance(train, StreamedRows)
        shares = [
            [row["input_ids"].tolist() for row in make_rows(data, tokenizer, held_out=False, share=(index, 2))]
            for index in range(2)
        ]
        assert sorted(shares[0] + shares[1]) == sorted(row for n, row in enumerate(ids) if n % 5)


@pytest.mark.parametrize("number", [1, 30])
def test_as_many_rows_are_evaluated_as_are_asked_for(number: int, tmp_path: Path, tokenizer: Any) -> None:
    """Of a single text and of several."""
    source = write_lines(tmp_path / "rows.jsonl", [{"text": "the quick brown fox jumps " * 20}] * number)
    data = DataConfig(train=(source,), packing="blocks", max_length=16, holdout_every=3, max_eval_rows=2)
    assert len(list(load_rows(data, tokenizer, 1024, held_out=True))) == 2
    assert len(list(load_rows(data, tokenizer, 1024))) > 2


def test_a_corpus_of_one_row(tmp_path: Path, tokenizer: Any) -> None:
    data = DataConfig(train=(write_lines(tmp_path / "one.jsonl", [{"text": "short"}]),), holdout_every=5)
    with pytest.raises(ConfigError, match=r"no rows to train on .*; data.holdout_every may leave too few"):
        load_rows(data, tokenizer, 1024)
    assert len(list(load_rows(data, tokenizer, 1024, held_out=True))) == 1
    data = DataConfig(train=data.train, eval=(write_lines(tmp_path / "none.jsonl", []),))
    with pytest.raises(ConfigError, match=r"no rows to evaluate on in .*none.jsonl \(those"):
        load_rows(data, tokenizer, 1024, held_out=True)


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
        ({"max_eval_rows": 5}, "max_eval_rows has no effect without anything to evaluate on"),
        ({"shuffle_buffer": 1, "streaming": True}, "shuffle_buffer is 1; it must be at least 2"),
        ({"shuffle_buffer": 100}, "shuffle_buffer has no effect without streaming"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{"train": ("x",), **settings})


def test_rows_without_an_answer_are_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text('{"prompt": "Who?", "response": "The fox."}\n{"prompt": "Who?", "response": ""}\n')
    data = DataConfig(train=(str(path),), packing="none", max_length=64, holdout_every=None)
    [row] = load_rows(data, tokenizer, 1024)
    assert "fox" in tokenizer.decode(row["input_ids"])
    path.write_text('{"prompt": "Who?", "response": ""}\n')
    with pytest.raises(ConfigError, match="no rows"):
        load_rows(data, tokenizer, 1024)
