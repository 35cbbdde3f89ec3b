"""Exports as GGUF files: read again they are the same model, with the names, keys and row order of llama.cpp."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from hopskip import LLM, SamplingParams
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.gguf import GGUFFile, gguf_name, hf_name
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import CheckpointError, ConfigError
from hopskip.export import early_exit, gguf
from hopskip.export.gguf_file import check_gguf, plan_gguf, rope_divisors
from hopskip.export.gguf_tokenizer import splitter_name
from hopskip.export.same_ids import TEXTS
from hopskip.export.source import open_source
from hopskip.text.pre_tokenizers import PRE_TOKENIZERS
from hopskip.text.tokenizer_files import load_tokenizer
from tests.test_fp8 import write_fp8
from tests.test_lora import write_adapter
from tests.tiny import (
    CHAT_TEMPLATE,
    FAMILIES,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    make_model,
    permute,
    write_checkpoint,
    write_gguf,
    write_tokenizer,
)

Q4_0 = gguf_package.GGMLQuantizationType.Q4_0
TEXT = "The quick brown fox, naïve café 你好 12:30"


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    assert {path.name for path in folder.iterdir()} == {file.name, "README.md"}
    return file


def assert_same_weights(found: Checkpoint, wanted: Checkpoint) -> None:
    assert found.names() == wanted.names()
    for name in found.names():
        assert np.array_equal(found.array(name), wanted.array(name)), name


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_read_again_it_is_the_same_model(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16, tokenizer=True)
    file = file_in(gguf(tmp_path / "model", tmp_path / "out"))
    assert file.name == "model-BF16.gguf"
    found, source = open_checkpoint(file), open_checkpoint(tmp_path / "model")
    assert_same_weights(found, source)
    assert {t.type.name for t in map(found.stored, found.names()) if len(t.shape) == 2} == {"BF16"}
    for field in ("qkv_bias", "qk_norm", "sliding_window", "bos_token_id", "eos_token_ids", "context_length"):
        assert getattr(found.config, field) == getattr(source.config, field), field
    assert found.config.rms_norm_eps == pytest.approx(source.config.rms_norm_eps)
    own, wanted = (config.rope.inverse_frequencies() for config in (found.config, source.config))
    np.testing.assert_allclose(own, wanted, rtol=1e-6)
    assert found.config.rope.amplitude == source.config.rope.amplitude


def test_the_file_has_the_keys_and_the_order_of_rows_of_llama_cpp(tmp_path: Path) -> None:
    """Against the table of its converter, by the reader of the gguf package."""
    model = write_checkpoint(tmp_path / "model", "llama3-gqa", tokenizer=True)
    file = file_in(gguf(tmp_path / "model", tmp_path / "out"))
    reader = gguf_package.GGUFReader(file)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items()}
    kinds = gguf_package.GGUFValueType
    layer = {
        "attn_norm": (64,),
        "attn_q": (64, 64),
        "attn_k": (64, 32),
        "attn_v": (64, 32),
        "attn_output": (64, 64),
        "ffn_norm": (64,),
        "ffn_gate": (64, 96),
        "ffn_up": (64, 96),
        "ffn_down": (96, 64),
    }
    table = {f"blk.{index}.{name}.weight": shape for index in range(3) for name, shape in layer.items()}
    table |= {"token_embd.weight": (64, 320), "output_norm.weight": (64,), "rope_freqs.weight": (8,)}
    assert {tensor.name: tuple(tensor.shape.tolist()) for tensor in reader.tensors} == table
    query = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
    own = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
    assert np.array_equal(query.data, permute(own, 4))
    divisors = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight").data
    assert divisors[0] == pytest.approx(1)
    assert divisors[-1] == pytest.approx(8)
    for key, kind, value in (
        ("general.architecture", kinds.STRING, "llama"),
        ("general.name", kinds.STRING, "model"),
        ("general.file_type", kinds.UINT32, 0),
        ("general.quantization_version", kinds.UINT32, 2),
        ("llama.vocab_size", kinds.UINT32, 320),
        ("llama.context_length", kinds.UINT32, 1024),
        ("llama.embedding_length", kinds.UINT32, 64),
        ("llama.block_count", kinds.UINT32, 3),
        ("llama.feed_forward_length", kinds.UINT32, 96),
        ("llama.attention.head_count", kinds.UINT32, 4),
        ("llama.attention.head_count_kv", kinds.UINT32, 2),
        ("llama.attention.key_length", kinds.UINT32, 16),
        ("llama.attention.value_length", kinds.UINT32, 16),
        ("llama.attention.layer_norm_rms_epsilon", kinds.FLOAT32, pytest.approx(1e-6)),
        ("llama.rope.dimension_count", kinds.UINT32, 16),
        ("llama.rope.freq_base", kinds.FLOAT32, 500_000.0),
        ("tokenizer.ggml.model", kinds.STRING, "gpt2"),
        ("tokenizer.ggml.pre", kinds.STRING, "smollm"),
        ("tokenizer.ggml.bos_token_id", kinds.UINT32, 0),
        ("tokenizer.ggml.eos_token_id", kinds.UINT32, 1),
        ("tokenizer.ggml.add_bos_token", kinds.BOOL, False),
        ("tokenizer.ggml.add_eos_token", kinds.BOOL, False),
        ("tokenizer.chat_template", kinds.STRING, CHAT_TEMPLATE),
    ):
        assert fields[key] == ([kind], value), key
    assert fields["tokenizer.ggml.token_type"][0] == [kinds.ARRAY, kinds.INT32]
    assert fields["tokenizer.ggml.token_type"][1] == [3, 3, 3, *[1] * 317]
    assert len(fields["tokenizer.ggml.tokens"][1]) == 320
    assert not any(key.startswith("llama.rope.scaling") for key in fields)


@pytest.mark.parametrize(("family", "architecture"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_architectures(family: str, architecture: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", family, tokenizer=True)
    assert GGUFFile(file_in(gguf(tmp_path / "model", tmp_path / "out"))).architecture == architecture


@pytest.mark.parametrize(
    ("dtype", "stored", "number"),
    [("auto", "F32", 0), ("f32", "F32", 0), ("half", "F16", 1), ("bfloat16", "BF16", 32), ("Q8_0", "Q8_0", 7)],
)
def test_types(dtype: str, stored: str, number: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    file = file_in(gguf(tmp_path / "model", tmp_path / "out", dtype=dtype))
    assert file.name == f"model-{stored}.gguf"
    found, source = open_checkpoint(file), open_checkpoint(tmp_path / "model")
    for name in found.names():
        kind, values = found.stored(name), source.array(name)
        assert kind.type.name == (stored if values.ndim == 2 else "F32")
        wanted = gguf_package.quants.quantize(values, gguf_package.GGMLQuantizationType[kind.type.name])
        expected = gguf_package.quants.dequantize(wanted, gguf_package.GGMLQuantizationType[kind.type.name])
        assert np.array_equal(found.array(name), expected.reshape(values.shape)), name
    assert GGUFFile(file).metadata["general.file_type"] == number


def test_rows_that_are_no_blocks_stay_float32(tmp_path: Path) -> None:
    make_model("llama2-mha", intermediate_size=72).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    found = open_checkpoint(file_in(gguf(tmp_path / "model", tmp_path / "out", dtype="q8")))
    types = {name: found.stored(f"model.layers.0.mlp.{name}.weight").type.name for name in ("down_proj", "up_proj")}
    assert types == {"down_proj": "F32", "up_proj": "Q8_0"}


@pytest.mark.parametrize("family", ["llama2-mha", "qwen2"])
def test_a_quantized_file_keeps_its_blocks_whole_and_cut(family: str, tmp_path: Path) -> None:
    source = tmp_path / "m.Q4_0.gguf"
    metadata = {"general.file_type": 2, "general.license": "apache-2.0", "general.sampling.temp": 0.5}
    write_gguf(source, make_model(family), types=Q4_0, tokenizer=byte_level_tokenizer(), metadata=metadata)
    whole = file_in(gguf(source, tmp_path / "whole"))
    assert whole.name == "m-Q4_0.gguf"
    cut = file_in(early_exit(source, tmp_path / "cut", exit_layer=2, format="gguf"))
    assert cut.name == "m-exit2-Q4_0.gguf"
    own = GGUFFile(source)
    for path, depth in ((whole, 3), (cut, 2)):
        found = GGUFFile(path)
        names = {name for name in own.tensors if not name.startswith("blk.") or int(name.split(".")[1]) < depth}
        assert found.tensors.keys() == names
        for name, tensor in found.tensors.items():
            assert tensor.type == own.tensors[name].type
            assert np.array_equal(tensor.blocks(), own.tensors[name].blocks()), name
        assert found.get("block_count") == depth
        for key in ("general.file_type", "general.license", "general.sampling.temp", "tokenizer.ggml.tokens"):
            assert found.metadata[key] == own.metadata[key]
    assert open_checkpoint(cut).config.num_hidden_layers == 2
    assert LLM(whole).generate(["The quick"], SamplingParams(max_new_tokens=12))[0].token_ids == (
        LLM(source).generate(["The quick"], SamplingParams(max_new_tokens=12))[0].token_ids
    )


def test_a_quantized_file_in_float32(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_model("llama2-mha"), types=Q4_0, tokenizer=byte_level_tokenizer())
    file = file_in(gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="fp32"))
    assert_same_weights(open_checkpoint(file), open_checkpoint(tmp_path / "m.gguf"))
    assert GGUFFile(file).metadata["general.file_type"] == 0


def test_8_bit_floats_become_bfloat16(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model", "qwen")
    write_tokenizer(tmp_path / "model")
    file = file_in(gguf(tmp_path / "model", tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    found, source = open_checkpoint(file), open_checkpoint(tmp_path / "model")
    assert file.name == "model-BF16.gguf"
    assert found.stored(name).type.name == "BF16"
    wanted = torch.from_numpy(source.array(name).copy()).bfloat16().float().numpy()
    assert np.array_equal(found.array(name), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft
def test_an_adapter_is_merged_on_the_way(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", "llama2-mha", tokenizer=True)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    found = open_checkpoint(file_in(gguf(tmp_path / "adapter", tmp_path / "out")))
    assert_same_weights(found, open_checkpoint(tmp_path / "adapter"))
    assert not np.array_equal(
        found.array("model.layers.0.self_attn.q_proj.weight"),
        open_checkpoint(tmp_path / "base").array("model.layers.0.self_attn.q_proj.weight"),
    )


def test_names_of_tensors_go_both_ways() -> None:
    for name in ("blk.11.attn_k_norm.weight", "blk.0.attn_q.bias", "output.weight", "token_embd.weight"):
        own = hf_name(name)
        assert own is not None
        assert gguf_name(own) == name


def test_a_sliding_window_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "mistral-window", tokenizer=True)
    out = gguf(tmp_path / "model", tmp_path / "out")
    assert open_checkpoint(file_in(out)).config.sliding_window == 48
    assert "attends over 48 tokens only. llama.cpp attends over all" in (out / "README.md").read_text()


def test_sampling_of_the_makers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    path = tmp_path / "model" / "generation_config.json"
    wanted = {"temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.0, "repetition_penalty": 1.25}
    for do_sample in (True, False):
        path.write_text(json.dumps({"do_sample": do_sample, **wanted}))
        file = file_in(gguf(tmp_path / "model", tmp_path / f"out-{do_sample}"))
        assert open_checkpoint(file).generation == (wanted if do_sample else {})
    reader = gguf_package.GGUFReader(tmp_path / "out-True" / "model-F32.gguf")
    assert reader.fields["general.sampling.top_k"].types == [gguf_package.GGUFValueType.INT32]


# -- settings without a form -------------------------------------------------------------------------------------------

YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "settings",
    [{"attention_factor": 1.0}, {"beta_fast": 0.5}, {"beta_slow": 2.0}, {"mscale": 0.7, "mscale_all_dim": 1.0}],
)
def test_yarn_of_other_settings_is_refused(settings: dict[str, Any]) -> None:
    yarn = RopeConfig(head_dim=16, **YARN)
    assert rope_divisors(yarn) is None
    with pytest.raises(ConfigError, match=r"RoPE settings \(yarn with its own .*have no form in GGUF.*folder instead"):
        rope_divisors(RopeConfig(head_dim=16, **YARN, **settings))


def test_the_file_is_compared_with_what_it_was_made_from(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama3-gqa", tokenizer=True)
    source = open_source(tmp_path / "model")
    plan = plan_gguf(source, source.checkpoint.config, "auto", "model")
    plan.metadata["llama.context_length"] = 512
    plan.write(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"a.gguf says context_length 512 instead of 1024"):
        check_gguf(tmp_path / "a.gguf", plan)
    plan.metadata["llama.context_length"] = 1024
    plan.metadata["llama.rope.freq_base"] = 1000.0
    plan.write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"b.gguf rotates otherwise"):
        check_gguf(tmp_path / "b.gguf", plan)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def written_tokenizer(folder: Path, out: Path) -> tuple[Any, dict[str, Any]]:
    file = file_in(gguf(folder, out))
    return load_tokenizer(file, open_checkpoint(file).config), GGUFFile(file).metadata


def test_a_byte_level_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha")
    write_tokenizer(tmp_path / "model", byte_level_tokenizer(marks=["<tool_call>"]), pad_token="<|endoftext|>")
    found, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    source = load_tokenizer(tmp_path / "model", open_checkpoint(tmp_path / "model").config)
    for text in (*TEXTS, TEXT, "<|im_start|>user\nHi<|im_end|><tool_call>"):
        assert found.encode(text) == source.encode(text), text
    assert metadata["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 4, 1]
    assert metadata["tokenizer.ggml.padding_token_id"] == 2
    assert found.chat_template == source.chat_template


def test_several_templates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha")
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }}"}]
    write_tokenizer(tmp_path / "model", chat_template=templates)
    _, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    assert metadata["tokenizer.chat_template"] == "plain"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_a_model_without_a_template_and_a_padded_vocabulary(tmp_path: Path) -> None:
    make_model("llama2-mha", vocab_size=330).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", chat_template=None)
    _, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    assert metadata["tokenizer.ggml.tokens"][320:] == [f"[PAD{index}]" for index in range(320, 330)]
    assert metadata["tokenizer.ggml.token_type"][319:] == [1, *[5] * 10]
    assert not any("template" in key for key in metadata)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    make_model("llama2-mha", vocab_size=310).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"its tokenizer has 320 tokens, the model's vocabulary 310"):
        gguf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_that_end_a_text(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [7, 1, 2]}))
    found, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    keys = {kind: metadata[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")}
    assert keys == {"eos": 1, "eot": 7, "eom": 2}
    assert set(found.eos_token_ids) == {1, 2, 7}


def test_a_sentencepiece_tokenizer(tmp_path: Path) -> None:
    size = byte_fallback_tokenizer().get_vocab_size()
    make_model("llama2-mha", vocab_size=size + 3).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model", byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    found, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    source = load_tokenizer(tmp_path / "model", open_checkpoint(tmp_path / "model").config)
    for text in (*TEXTS, TEXT, "hello hello  he ll"):
        assert found.encode(text) == source.encode(text), text
        assert found.encode(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.pre"] == "default"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ranks = {token: -scores[tokens.index(token)] for token in ("he", "ll", "hell", "hello", "▁hello", "▁▁")}
    assert list(ranks.values()) == [0, 1, 2, 3, 4, 5]
    assert len(scores) == size + 3
    assert scores[tokens.index("é")] == scores[-1] == -1e6


def test_sentencepieces_own_file(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in (*TEXTS, TEXT) if text.strip()] * 3),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    make_model("llama2-mha", vocab_size=700).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").write_bytes(model.getvalue())
    found, metadata = written_tokenizer(tmp_path / "model", tmp_path / "out")
    source = load_tokenizer(tmp_path / "model", open_checkpoint(tmp_path / "model").config)
    assert found.encode(TEXT) == source.encode(TEXT)
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


def fake_source(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name].build()
    return tokenizer


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "deepseek-llm", "deepseek-coder"])
def test_splitters_have_the_names_of_llama_cpps_converter(name: str) -> None:
    row = PRE_TOKENIZERS[name]
    assert splitter_name(fake_source(name), row.ignores_merges, Path()) == name


@pytest.mark.parametrize("name", list(PRE_TOKENIZERS))
def test_a_splitter_is_named_by_one_that_cuts_alike(name: str) -> None:
    """On texts that it was not chosen by."""
    row = PRE_TOKENIZERS[name]
    found = PRE_TOKENIZERS[splitter_name(fake_source(name), row.ignores_merges, Path())]
    assert found.ignores_merges == row.ignores_merges
    own, other = row.build(), found.build()
    draw = random.Random(0)
    for _ in range(150):
        text = "".join(draw.choices("aBéß字あ19  \n\r\t'sTll.,-!(/#~", k=12))
        assert own.pre_tokenize_str(text) == other.pre_tokenize_str(text), text


@pytest.mark.parametrize("splitter", [None, pre_tokenizers.Split(Regex("x"), "isolated")])
def test_a_splitter_that_llama_cpp_lacks(splitter: Any, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    with pytest.raises(CheckpointError, match=r"m: its tokenizer cuts text in a way that llama.cpp has no name for"):
        splitter_name(tokenizer if splitter is not None else Tokenizer(models.BPE()), False, Path("m"))


@pytest.mark.parametrize("kind", ["WordPiece", "no-byte-fallback"])
def test_other_kinds_of_tokenizers(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha")
    model = models.WordPiece({"a": 0, "[UNK]": 1}) if kind == "WordPiece" else models.BPE({"a": 0}, [])
    write_tokenizer(tmp_path / "model", Tokenizer(model))
    message = (
        "of kind 'WordPiece' cannot be written" if kind == "WordPiece" else "neither byte-level nor SentencePiece's"
    )
    with pytest.raises(CheckpointError, match=message):
        gguf(tmp_path / "model", tmp_path / "out")


def test_a_tokenizer_that_would_give_other_ids(tmp_path: Path) -> None:
    """One that puts a prefix before words, which no table can say."""
    from tokenizers import normalizers

    tokenizer = byte_level_tokenizer()
    tokenizer.normalizer = normalizers.Lowercase()
    write_checkpoint(tmp_path / "model", "llama2-mha")
    write_tokenizer(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=r"no exact form in the other format: .The quick brown fox"):
        gguf(tmp_path / "model", tmp_path / "out")


def test_mixed_types_stay(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "llama2-mha", tokenizer=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].half()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    found = open_checkpoint(file_in(gguf(tmp_path / "model", tmp_path / "out")))
    assert found.stored("lm_head.weight").type.name == "F16"
    assert found.stored("model.embed_tokens.weight").type.name == "F32"
    assert_same_weights(found, open_checkpoint(tmp_path / "model"))


def test_bos_of_the_config_where_the_tokenizer_names_none(tmp_path: Path) -> None:
    make_model("llama2-mha", bos_token_id=2).save_pretrained(tmp_path / "model")
    for named, wanted in ((None, 2), ("<|im_start|>", 0)):
        write_tokenizer(tmp_path / "model", bos_token=named)
        _, metadata = written_tokenizer(tmp_path / "model", tmp_path / f"out-{wanted}")
        assert metadata["tokenizer.ggml.bos_token_id"] == wanted
