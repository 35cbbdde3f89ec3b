"""Tokenizers and chat templates against transformers; streams of text against whole decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.errors import CheckpointError, PromptError
from hopskip.text.tokenizer import Detokenizer, Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from tests.models import tiny_config
from tests.properties import examples
from tests.test_families import load, logits_in_chunks, reference_logits
from tests.tiny import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    write_tokenizer,
)

CONFIG = tiny_config(vocab_size=VOCAB_SIZE)
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\ttabs \n\n\nand lines\r\n",
    "def f(x):\n    if x:\n        return [x ** 2 for _ in range(10)]\n",
    "12345 3.14159 1e-9 \uff12\uff10 ½ ²",
    "你好世界。こんにちは 안녕하세요 Привет עולם",
    "🙂👩‍👩‍👧‍👦🇩🇪 naïve café é",
    "<|im_start|>user\nspecial<|im_end|> tokens <|endoftext|>",
    "don't can't I'LL we've 's",
    "https://example.org/?q=a%20b&c=d#e",
    "\u200b\ufeff\x00\x7f",
]
BOS = {
    "__type": "AddedToken",
    "content": "<s>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}],
    [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  And <|im_end|> why?\n"},
    ],
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@cache
def byte_level() -> Tokenizer:
    return wrap(byte_level_tokenizer())


@cache
def byte_fallback() -> Tokenizer:
    return wrap(byte_fallback_tokenizer())


def id_of(tokenizer: Tokenizer, token: str) -> int:
    index: int | None = tokenizer.inner.token_to_id(token)
    assert index is not None
    return index


def wrap(backend: Backend) -> Tokenizer:
    return Tokenizer(backend, special_tokens={}, chat_template=None, eos_token_ids=())


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_folder_equals_transformers(text: str, folder: Path) -> None:
    ours, theirs = load_tokenizer(folder, CONFIG), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CHATS)
def test_chat_equals_transformers(messages: list[dict[str, str]], folder: Path) -> None:
    ours, theirs = load_tokenizer(folder, CONFIG), AutoTokenizer.from_pretrained(folder)
    for add in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
        assert ours.apply_chat_template(messages, add_generation_prompt=add) == expected


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("makes_bos", [False, True])
def test_bos(add_bos_token: bool | None, makes_bos: bool, tmp_path: Path) -> None:
    """The post-processor in tokenizer.json decides, whatever the setting says: so it is in transformers 5."""
    backend = byte_fallback_tokenizer()
    if not makes_bos:
        backend = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "post_processor": None}))
    settings: dict[str, Any] = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    write_tokenizer(tmp_path, backend, bos_token=BOS, eos_token="</s>", chat_template=None, **settings)
    ids = load_tokenizer(tmp_path, CONFIG).encode("hello")
    assert ids == ([1, 294] if makes_bos else [294])
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ids == theirs.encode("hello")


@pytest.mark.parametrize(
    ("from_config", "own", "template", "union"),
    [
        ((), "<|im_end|>", None, (1,)),
        ((7, 9), "<|im_end|>", None, (7, 9, 1)),
        ((9, 1, 9), "<|im_end|>", CHAT_TEMPLATE, (9, 1)),
        ((7,), {"__type": "AddedToken", "content": "<|endoftext|>"}, CHAT_TEMPLATE, (7, 2, 1)),
        ((7,), None, CHAT_TEMPLATE, (7, 1)),
        ((7,), None, "{{ '<|eot_id|>' }}", (7,)),
        ((7,), "<|nowhere|>", None, (7,)),
        ((), None, None, ()),
    ],
)
def test_eos_ids(
    from_config: tuple[int, ...], own: Any, template: str | None, union: tuple[int, ...], tmp_path: Path
) -> None:
    """Those of the config, the tokenizer's own, and those that end a turn; a token that only pads is none."""
    write_tokenizer(tmp_path, eos_token=own, chat_template=template, pad_token="<|endoftext|>")
    assert load_tokenizer(tmp_path, tiny_config(eos_token_ids=from_config)).eos_token_ids == union


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    write_tokenizer(tmp_path, backend)
    assert load_tokenizer(tmp_path, CONFIG).encode("hello world") == byte_level().encode("hello world")


def test_template_file_comes_before_the_setting(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    tokenizer = load_tokenizer(folder, CONFIG)
    assert tokenizer.decode(tokenizer.apply_chat_template(CHATS[0])) == "What is the capital of France?"


def test_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_tokenizer(tmp_path, chat_template=templates)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    assert tokenizer.decode(tokenizer.apply_chat_template(CHATS[0])) == "plain"


def test_template_helpers(tmp_path: Path) -> None:
    """What transformers offers to templates: loop controls, tojson, the date, special tokens, generation marks."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}"
        "{% endfor %}"
        "{{ strftime_now('%Y') | length }}{% if tools is none and extra == 3 %}!{% endif %}"
    )
    write_tokenizer(tmp_path, chat_template=template)
    ours, theirs = load_tokenizer(tmp_path, CONFIG), AutoTokenizer.from_pretrained(tmp_path)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "<é>", "name": None},
        {"role": "user", "content": "never"},
    ]
    ids = ours.apply_chat_template(messages, extra=3)
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, extra=3)
    assert ours.decode(ids) == '{"role": "user", "content": "<é>"}4!'


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(PromptError, match=r"refuses these messages.*unsafe"):
        load_tokenizer(tmp_path, CONFIG).apply_chat_template(CHATS[0])
    write_tokenizer(tmp_path, chat_template="{{ messages.append(1) }}")
    with pytest.raises(PromptError, match="refuses these messages"):
        load_tokenizer(tmp_path, CONFIG).apply_chat_template(CHATS[0])


def test_template_errors(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="roles must alternate"):
        load_tokenizer(tmp_path, CONFIG).apply_chat_template(CHATS[0])
    write_tokenizer(tmp_path, chat_template="{% for %}")
    with pytest.raises(CheckpointError, match="chat template is not valid"):
        load_tokenizer(tmp_path, CONFIG)
    write_tokenizer(tmp_path, chat_template=7)
    with pytest.raises(CheckpointError, match="chat template is a int"):
        load_tokenizer(tmp_path, CONFIG)
    write_tokenizer(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(tmp_path, CONFIG)
    assert not tokenizer.has_chat_template
    with pytest.raises(PromptError, match="no chat template; give a plain prompt"):
        tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.parametrize("messages", [[], "Hello", ["Hello"], [{"content": "no role"}], [{"role": 3, "content": "x"}]])
def test_wrong_messages(messages: Any, folder: Path) -> None:
    with pytest.raises(PromptError, match="chat"):
        load_tokenizer(folder, CONFIG).apply_chat_template(messages)


def test_text_that_is_no_text(folder: Path) -> None:
    with pytest.raises(PromptError, match="not valid text"):
        load_tokenizer(folder, CONFIG).encode("lone \ud800 surrogate")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer that can be read.*put the model's tokenizer\.json"):
        load_tokenizer(tmp_path, CONFIG)


def test_damaged_tokenizer_files(folder: Path) -> None:
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(folder, CONFIG)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder, CONFIG)


def test_transformers_is_not_imported_for_ordinary_checkpoints(folder: Path) -> None:
    """Its import costs more than all the rest of a start."""
    script = (
        "import sys; from pathlib import Path\n"
        "from hopskip.text.tokenizer_files import load_tokenizer; from tests.models import tiny_config\n"
        "load_tokenizer(Path(sys.argv[1]), tiny_config()); print('transformers' in sys.modules)"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "False"


def test_vocabularies_that_only_transformers_can_build(tmp_path: Path) -> None:
    """A folder without tokenizer.json goes through AutoTokenizer."""
    backend = json.loads(byte_level_tokenizer().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(backend["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in backend["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path, CONFIG), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert len(ours.encode("hello world")) > 1


# --- The default model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default(default_model: Path) -> tuple[Tokenizer, Any, ModelConfig]:
    """The default model's tokenizer, and transformers' for the same file.

    transformers 5.23 does not know the pre-tokenizer `smollm` of the file and splits as GPT-2 does, so "\\n\\n1" and
    "  1" come out otherwise than with the model's own tokenizer.json (and llama.cpp), which take digits apart first.
    """
    config = open_checkpoint(default_model).config
    theirs = AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return load_tokenizer(default_model, config), theirs, config


@pytest.mark.parametrize("text", [*TEXTS, "List:\n\n1. one\n\n 22  two", "x = [\n    1,\n    22\n]"])
def test_default_model_equals_transformers(text: str, default: tuple[Tokenizer, Any, ModelConfig]) -> None:
    ours, theirs, _ = default
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CHATS)
def test_default_model_chat_equals_transformers(
    messages: list[dict[str, str]], default: tuple[Tokenizer, Any, ModelConfig]
) -> None:
    ours, theirs, _ = default
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(messages) == expected


def test_default_model_known_ids(default: tuple[Tokenizer, Any, ModelConfig]) -> None:
    tokenizer, _, config = default
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.eos_token_ids == (2,)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (8192, True)


def test_default_model_logits_equal_transformers(default_model: Path) -> None:
    """Dequantized to float32, the same numbers; over logits of about 20, sums in another order differ by up to 1e-3."""
    checkpoint = open_checkpoint(default_model)
    assert (checkpoint.quantization, checkpoint.dtype) == ("Q4_1", "bfloat16")
    ids = torch.tensor(load_tokenizer(default_model, checkpoint.config).apply_chat_template(CHATS[1]))
    theirs = AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()
    for name in ("model.layers.7.self_attn.q_proj.weight", "model.layers.29.mlp.down_proj.weight"):
        assert torch.equal(load_tensor(checkpoint, name), theirs.get_parameter(name))
    logits = logits_in_chunks(load(default_model), ids, [len(ids) - 3, 1, 2])
    torch.testing.assert_close(logits, reference_logits(theirs, ids), rtol=0, atol=1e-3)


# --- Streams ----------------------------------------------------------------------------------------------------------


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_a_character_is_held_back_until_it_is_complete(tokenizer: Any) -> None:
    ids = tokenizer().encode("a🙂b")
    streamed = pieces(tokenizer(), ids)
    assert "".join(streamed) == "a🙂b"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in streamed)
    assert streamed.index("🙂") > 1  # after pieces without text: the bytes came one by one
    assert streamed.count("") >= 3


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@settings(max_examples=examples(3))
@given(data=st.data())
def test_pieces_of_a_text(tokenizer: Any, data: st.DataObject) -> None:
    """Any text comes back whole, and no piece ever has to be taken back."""
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}")))
    ids = tokenizer().encode(text)
    assert "".join(pieces(tokenizer(), ids)) == tokenizer().decode(ids)
    if tokenizer is byte_level and not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer().decode(ids) == text


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@settings(max_examples=examples(5))
@given(data=st.data())
def test_pieces_of_any_ids(tokenizer: Any, data: st.DataObject) -> None:
    """Joined, the pieces are the decoded whole, for ids that are no text too; every piece is valid Unicode."""
    size = tokenizer().inner.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    streamed = pieces(tokenizer(), ids)
    assert "".join(streamed) == tokenizer().decode(ids)
    for piece in streamed:
        piece.encode("utf-8")


@settings(max_examples=examples(3))
@given(ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=7))
def test_bytes_that_are_no_text_decode_as_in_the_library(ids: list[int]) -> None:
    assert byte_level().decode(ids) == byte_level().inner.decode(ids, skip_special_tokens=True)


def test_endless_bad_bytes_are_not_held_back_for_ever() -> None:
    bad = byte_level().inner.token_to_id("ł")  # byte 0x82: never starts a character
    assert bad is not None
    streamed = pieces(byte_level(), [bad] * 100)
    assert max(map(len, streamed)) <= 8
    assert "".join(streamed) == "\N{REPLACEMENT CHARACTER}" * 100


def test_special_tokens_have_no_text() -> None:
    ids = byte_level().encode("a<|im_end|>b")
    assert 1 in ids
    assert byte_level().decode(ids) == "ab"
    assert "".join(pieces(byte_level(), ids)) == "ab"


def test_a_flushed_stream_says_nothing_twice() -> None:
    detokenizer = Detokenizer(byte_level())
    ids = byte_level().encode("🙂")
    for token_id in ids[:-1]:
        assert detokenizer.push(token_id) == ""
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"
    assert detokenizer.flush() == ""


def test_chat_template_of_the_tests_is_the_models(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHAT_TEMPLATE


# --- Continuations and added tokens -----------------------------------------------------------------------------------


def test_a_continuation_keeps_its_first_space() -> None:
    """SentencePiece tokenizers leave out the space before a text's first word, not before a continuation's."""
    tokenizer = byte_fallback()
    hello = id_of(tokenizer, "▁hello")
    assert tokenizer.decode([hello]) == "hello"
    for prompt in ("hello", "hello ", "a", "é🙂", "🙂", " ", "<s>hello</s>", "hello</s><s>", "a" * 50):
        prompt_ids = tokenizer.encode(prompt)
        before = tokenizer.decode(prompt_ids)
        for ids in ([hello], [hello, hello], tokenizer.encode("🙂 x")[1:], [2, hello, 1, hello], []):
            added = tokenizer.decode(ids, after=prompt_ids)
            assert before + added == tokenizer.decode([*prompt_ids, *ids])
            detokenizer = Detokenizer(tokenizer, prompt_ids)
            assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == added
    for nothing in ([], [1], [1, 2, 1]):
        assert tokenizer.decode([hello], after=nothing) == "hello"


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
@settings(max_examples=examples(3))
@given(data=st.data())
def test_pieces_of_a_continuation(tokenizer: Any, data: st.DataObject) -> None:
    """The text of both, wherever they are cut apart: a character that is cut shows with the continuation."""
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\N{REPLACEMENT CHARACTER}")))
    ids = tokenizer().encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    shown = tokenizer().decode(ids[:cut]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert shown + tokenizer().decode(ids[cut:], after=ids[:cut]) == tokenizer().decode(ids)


@pytest.mark.parametrize("bad", [-1, 2**40, 10**6])
def test_a_prompt_of_ids_that_are_none_is_not_the_decoders_affair(bad: int) -> None:
    assert "".join([Detokenizer(byte_fallback(), [bad]).push(294)]) == "hello"


def test_tokens_without_text_are_not_kept() -> None:
    """However many of them come, a step's work stays the same."""
    detokenizer = Detokenizer(byte_level())
    ids = byte_level().encode("a🙂")
    shown = [detokenizer.push(i) for i in ids[:2]]
    for _ in range(1000):
        assert detokenizer.push(1) == detokenizer.push(10**5) == ""
    assert len(detokenizer._window) <= 3
    shown += [detokenizer.push(i) for i in ids[2:]]
    assert "".join(shown) == "a🙂"


@pytest.mark.parametrize("added", ["é", "ß", "naïve", "Ā", "日本", "é b", "<é>", "plain", "\u00ad"])
@pytest.mark.parametrize(("special", "in_sequence"), [(False, False), (True, False), (False, True)])
def test_added_tokens_stand_for_their_own_letters(added: str, special: bool, in_sequence: bool) -> None:
    """GPT-2's alphabet writes bytes as letters such as these; in an added token they are what they look like."""
    backend = byte_level_tokenizer()
    backend.add_tokens([AddedToken(added, normalized=False, special=special)])
    if in_sequence:
        backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    tokenizer = wrap(backend)
    index = id_of(tokenizer, added)
    shown = "" if special else added
    assert tokenizer.encode(f"x{added}y")[1:-1] == [index]
    assert tokenizer.token_bytes(index) == added.encode()
    assert tokenizer.decode([index]) == shown
    around = [*tokenizer.encode("a🙂"), index, index, *tokenizer.encode("x 🙂")]
    assert tokenizer.decode(around) == "".join(pieces(tokenizer, around)) == f"a🙂{shown}{shown}x 🙂"
    half = [*tokenizer.encode("🙂")[:-1], index]
    assert tokenizer.decode(half) == "".join(pieces(tokenizer, half)) == f"\N{REPLACEMENT CHARACTER}{shown}"


def test_bytes_of_tokens() -> None:
    plain = byte_fallback()
    for token, data in (("<0xF0>", b"\xf0"), ("▁hello", b" hello"), ("é", "é".encode())):
        assert plain.token_bytes(id_of(plain, token)) == data
    tokens = {"<unk>": 0, "<0xZZ>": 1, "<0x4>": 2}
    odd = wrap(Backend(models.BPE(vocab=tokens, merges=[], unk_token="<unk>")))
    assert [odd.token_bytes(i) for i in (1, 2, 3)] == [b"<0xZZ>", b"<0x4>", b""]
