"""Self-speculation behind `generate` of transformers: the same text as plain `generate`, whatever it is asked for."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    DynamicCache,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

import hopskip.hf  # noqa: E402
from tests.tiny import FAMILIES, byte_level_tokenizer, make_model, write_checkpoint, write_tokenizer  # noqa: E402

LENGTH = 14


def prepared(model: Any) -> Any:
    """With layers behind the first two that change little, so that some drafts are right and some are not."""
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
    model.generation_config.pad_token_id = 3
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return prepared(make_model("llama3-gqa"))


def batch(size: int) -> dict[str, Any]:
    """Prompts of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 320, (size, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in zip(range(size), (0, 4, 1, 7), strict=False):
        ids[row, :padding], mask[row, :padding] = 3, 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, inputs: dict[str, Any], own: dict[str, Any] | None = None, **asked: Any) -> tuple[Any, Any, Any]:
    """What plain `generate` gives, what self-speculation gives, and its counts."""
    stats: dict[str, Any] = {}
    given = {"max_new_tokens": LENGTH, **inputs, **asked}
    torch.manual_seed(11)
    plain = model.generate(**given)
    torch.manual_seed(11)
    own = {"exit_layer": 2, "num_draft_tokens": 3, **(own or {})}
    found = model.generate(**given, custom_generate=hopskip.hf.self_speculative, draft_stats=stats, **own)
    return plain, found, stats


class Banned(LogitsProcessor):  # type: ignore[misc]
    """A user's own processor: forbids every token divisible by the length of the text."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.index_fill(1, torch.arange(0, scores.shape[1], input_ids.shape[1]), -torch.inf)


class EndsAt(StoppingCriteria):  # type: ignore[misc]
    """Each text ends after some multiple of a number."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] % 5 == 0


COMBINATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.4},
    "no repeated ngrams": {"no_repeat_ngram_size": 2},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": list(range(4, 100))},
    "min_length": {"min_length": 14, "eos_token_id": list(range(4, 100))},
    "bad words": {"bad_words_ids": [[7], [9, 11], [200, 201]]},
    "suppressed tokens": {"suppress_tokens": list(range(0, 320, 3))},
    "sequence bias": {"sequence_bias": [[[5], 3.0], [[17, 18], 9.0]]},
    "forced end": {"forced_eos_token_id": 9, "eos_token_id": 9},
    "several ends": {"eos_token_id": list(range(4, 60))},
    "allowed tokens": {"prefix_allowed_tokens_fn": lambda row, ids: range(4 + row, 320, 2)},
    "encoder penalties": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
    "length decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 8},
    "own processor": {"logits_processor": [Banned()]},
    "own criterion": {"stopping_criteria": [EndsAt()], "eos_token_id": 7},
    "guidance": {"guidance_scale": 1.7},
    "drawn": {"do_sample": True},
    "drawn, truncated": {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "drawn, typical": {"do_sample": True, "typical_p": 0.8, "repetition_penalty": 1.2, "eos_token_id": [5, 6, 7, 8]},
    "drawn, eta and epsilon": {"do_sample": True, "eta_cutoff": 1e-3, "epsilon_cutoff": 1e-4, "temperature": 1.5},
    "drawn, several of each": {"do_sample": True, "num_return_sequences": 2, "renormalize_logits": True},
    "prompt in parts": {"prefill_chunk_size": 4},
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_text_is_that_of_plain_generate(model: Any, name: str, size: int) -> None:
    plain, found, stats = both(model, batch(size), **COMBINATIONS[name])
    assert torch.equal(plain, found)
    assert stats["num_draft_tokens"] >= stats["num_accepted_tokens"] == sum(stats["num_accepted_tokens_per_pos"])


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Texts longer than Mistral's window of 48, which drafts are cut back in."""
    model = prepared(make_model(family))
    plain, found, stats = both(model, batch(2), max_new_tokens=50, repetition_penalty=1.2)
    assert torch.equal(plain, found)
    assert 0 < stats["num_accepted_tokens"] < stats["num_draft_tokens"]


def test_counts_of_a_batch_of_one(model: Any) -> None:
    """Each pass gives a token and what was accepted; the prompt's gives the first."""
    _, found, stats = both(model, batch(1), max_new_tokens=30)
    assert found.shape[1] == 9 + 30
    assert stats["num_target_passes"] + stats["num_accepted_tokens"] == 29
    assert stats["num_drafts"] in (stats["num_target_passes"], stats["num_target_passes"] - 1)
    assert len(stats["num_accepted_tokens_per_pos"]) == 3
    assert stats["num_accepted_tokens_per_pos"] == sorted(stats["num_accepted_tokens_per_pos"], reverse=True)


def test_drawn_texts_have_the_exact_distribution() -> None:
    """All texts of two tokens over a vocabulary of four, enumerated, against a thousand drawn ones: chi-squared."""
    model = prepared(make_model("llama2-mha", vocab_size=4, bos_token_id=0, eos_token_id=1))
    model.generation_config.pad_token_id = None
    ids = torch.tensor([[2, 3, 1]])
    with torch.no_grad():
        first = (model(ids).logits[0, -1] / 1.3).softmax(-1)
        texts = torch.cat((ids.expand(4, 3), torch.arange(4)[:, None]), dim=1)
        second = (model(texts).logits[:, -1] / 1.3).softmax(-1)
    expected = {(a, b): float(first[a] * second[a, b]) for a, b in itertools.product(range(4), repeat=2)}
    counts = dict.fromkeys(expected, 0)
    torch.manual_seed(0)
    asked: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": 3}
    accepted = 0
    for _ in range(250):
        stats: dict[str, Any] = {}
        found = model.generate(
            ids.expand(4, 3), custom_generate=hopskip.hf.self_speculative, exit_layer=1, draft_stats=stats, **asked
        )
        accepted += stats["num_accepted_tokens"]
        for a, b, _ in found[:, 3:].tolist():
            counts[a, b] += 1
    assert accepted > 0
    chi = sum((counts[text] - 1000 * p) ** 2 / (1000 * p) for text, p in expected.items())
    assert chi < 37.7  # 15 degrees of freedom: exceeded once in a thousand; the seed is fixed


def test_scores_logits_and_cache_come_back(model: Any) -> None:
    asked: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain, found, _ = both(model, batch(4), **asked)
    assert type(found) is type(plain)
    assert torch.equal(plain.sequences, found.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == LENGTH
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(plain[name]), atol=1e-4, rtol=1e-4)
    assert found.past_key_values.get_seq_length() == 9 + LENGTH - 1
    for own, theirs in zip(found.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(own.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_scores_are_left_out_unless_asked_for(model: Any) -> None:
    _, found, _ = both(model, batch(1), return_dict_in_generate=True)
    assert found.scores is None
    assert found.logits is None


def test_a_cache_serves_the_next_turn(model: Any) -> None:
    inputs, cache = batch(2), DynamicCache()
    own = {"custom_generate": hopskip.hf.self_speculative, "exit_layer": 2, "max_new_tokens": 6}
    first = model.generate(**inputs, past_key_values=cache, **own)
    ids = torch.cat((first, torch.tensor([[8, 9], [10, 11]])), dim=1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)), dim=1)
    again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **own)
    plain = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(again, plain)
    with pytest.raises(ValueError, match="holds the whole prompt already"):
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **own)


def test_a_cache_of_windows_that_is_in_use_is_cut_back() -> None:
    model = prepared(make_model("mistral-window", sliding_window=8))
    inputs, caches = batch(1), [DynamicCache(config=model.config) for _ in range(2)]
    model(inputs["input_ids"][:, :8], past_key_values=caches[0])
    model(inputs["input_ids"][:, :8], past_key_values=caches[1])
    plain = model.generate(**inputs, past_key_values=caches[0], max_new_tokens=20)
    own = {"custom_generate": hopskip.hf.self_speculative, "exit_layer": 2}
    assert torch.equal(plain, model.generate(**inputs, past_key_values=caches[1], max_new_tokens=20, **own))


def test_prompts_of_embeddings(model: Any) -> None:
    inputs = batch(2)
    embeds = {
        "inputs_embeds": model.model.embed_tokens(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    plain, found, stats = both(model, embeds)
    assert torch.equal(plain, found)
    assert stats["num_draft_tokens"] > 0


class Watch(LogitsProcessor):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.seen.append(input_ids.tolist())
        return scores


class WatchEnds(Watch, StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        super().__call__(input_ids, scores)
        assert len(scores) == input_ids.shape[1] - 9
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_processors_and_criteria_see_what_plain_generate_shows_them(model: Any) -> None:
    asked = {**batch(4), "max_new_tokens": LENGTH, "return_dict_in_generate": True, "output_scores": True}
    calls = []
    for own in ({}, {"custom_generate": hopskip.hf.self_speculative, "exit_layer": 2}):
        processor, criterion = Watch(), WatchEnds()
        model.generate(**asked, logits_processor=[processor], stopping_criteria=[criterion], **own)
        calls.append((processor.seen, criterion.seen))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("fails_at", range(1, 9))
def test_errors_leave_model_and_cache_usable(model: Any, fails_at: int) -> None:
    """Wherever a layer fails, in the prompt's pass, a draft or a verify pass, every layer of the cache has the same
    positions afterwards, and they hold."""
    inputs, cache, calls = batch(1), DynamicCache(), itertools.count(1)

    def fail(*_: Any) -> None:
        if next(calls) == fails_at:
            raise RuntimeError("injected")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    own = {"custom_generate": hopskip.hf.self_speculative, "exit_layer": 2, "num_draft_tokens": 2}
    try:
        with pytest.raises(RuntimeError, match="injected"):
            model.generate(**inputs, past_key_values=cache, max_new_tokens=20, **own)
    finally:
        handle.remove()
    lengths = {layer.get_seq_length() for layer in cache.layers}
    assert len(lengths) <= 1
    assert model.config.num_hidden_layers == len(model.model.layers) == 3
    plain = model.generate(**inputs, max_new_tokens=LENGTH)
    mask = torch.ones_like(plain)
    again = model.generate(plain, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **own)
    assert torch.equal(again, model.generate(plain, attention_mask=mask, max_new_tokens=4))


class Streamer(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, value: Any) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_streamers_get_what_plain_generate_gives_them(model: Any) -> None:
    asked: dict[str, Any] = {**batch(2), "max_new_tokens": 6, "eos_token_id": list(range(4, 40))}
    plain, named, raw = Streamer(), Streamer(), Streamer()
    model.generate(**asked, streamer=plain)
    model.generate(**asked, custom_generate=hopskip.hf.self_speculative, exit_layer=2, token_streamer=named)
    hopskip.hf.generate(model, **asked, exit_layer=2, streamer=raw)
    assert plain.got == named.got == raw.got
    assert plain.got[-1] == "end"


def tokenizer_of() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), pad_token="<|endoftext|>")


@pytest.mark.parametrize("place", ["argument", "given config", "model's config"])
def test_stop_strings(model: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, inputs = tokenizer_of(), batch(2)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0, 9:])
    asked: dict[str, Any] = {**inputs, "max_new_tokens": 20, "tokenizer": tokenizer}
    config = transformers.GenerationConfig(stop_strings=text[5:7], max_new_tokens=20, pad_token_id=3)
    if place == "argument":
        asked["stop_strings"] = [text[5:7]]
    elif place == "given config":
        asked["generation_config"] = config
    else:
        monkeypatch.setattr(model, "generation_config", config)
    plain = model.generate(**asked)
    found = hopskip.hf.generate(model, **asked, exit_layer=2)
    assert torch.equal(plain, found)
    assert config.stop_strings == text[5:7]
    del asked["tokenizer"]
    with pytest.raises(ValueError, match="need the model's tokenizer"):
        hopskip.hf.generate(model, **asked, exit_layer=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"exit_layer": 0}, "exit_layer is 0; the model has 3 layers, so give 1 to 2"),
        ({"exit_layer": 3}, "exit_layer is 3; the model has 3 layers, so give 1 to 2"),
        ({"exit_layer": True}, "exit_layer is True"),
        ({"exit_layer": "2"}, "exit_layer is '2'"),
        ({"exit_layer": None}, "exit_layer is needed: the number of layers that draft, 1 to 2"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0; it must be a whole number of at least 1"),
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5"),
        ({"num_draft_tokens": True}, "num_draft_tokens is True"),
        ({"num_beams": 2}, "ask for beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens has no effect here"),
        ({"assistant_early_exit": 2}, "assistant_early_exit has no effect here"),
        ({"use_cache": False}, "use_cache is False, but self-speculation needs a cache"),
        ({"cache_implementation": "static"}, "cannot be cut back"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states is not kept"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not kept"),
        ({"labels": torch.ones(1, 9)}, "labels cannot be used with self-speculation"),
        ({"engine": "cuda"}, "engine is 'cuda'; choose one of torch, native"),
        ({"exit_branch": "somewhere"}, "exit_branch=somewhere and exit_layer=2 are two exits"),
        ({"precision": "q8"}, "precision=q8 has no effect with engine 'torch'"),
    ],
)
def test_what_cannot_be_is_refused(model: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(
            **batch(1),
            max_new_tokens=4,
            custom_generate=hopskip.hf.self_speculative,
            **{"exit_layer": 2, "num_draft_tokens": 3, **asked},
        )


def test_other_assistants_and_other_architectures_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="assistant_model has no effect here"):
        hopskip.hf.generate(model, **batch(1), exit_layer=2, assistant_model=model)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=320, bos_token_id=0, eos_token_id=1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no decoder layers in a row"):
        both(transformers.GPT2LMHeadModel(config), batch(1), own={"exit_layer": 1})


def test_the_checkpoint_recommends(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, "hopskip", {"exit_layer": 2, "num_draft_tokens": 2}, raising=False)
    stats: dict[str, Any] = {}
    model.generate(**batch(1), custom_generate=hopskip.hf.self_speculative, draft_stats=stats, max_new_tokens=9)
    assert len(stats["num_accepted_tokens_per_pos"]) == 2


# -- the folder --------------------------------------------------------------------------------------------------------

WITHOUT_HOPSKIP = """
import sys
sys.modules["hopskip"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
folder = sys.argv[1]
ids = torch.tensor([[5, 6, 7, 8]])
plain = AutoModelForCausalLM.from_pretrained(folder)
text = plain.generate(ids, max_new_tokens=12)
stats = {}
found = plain.generate(ids, max_new_tokens=12, custom_generate=folder, trust_remote_code=True, draft_stats=stats)
assert torch.equal(text, found)
assert len(stats["num_accepted_tokens_per_pos"]) == 3, stats
tokenizer = AutoTokenizer.from_pretrained(folder)
carrying = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
stop = tokenizer.decode(text[0, 9:11])
found = carrying.generate(ids, max_new_tokens=12, streamer=streamer, stop_strings=[stop], tokenizer=tokenizer,
                          draft_stats=(stats := {}), exit_layer=1, num_draft_tokens=2)
assert torch.equal(found, plain.generate(ids, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer))
assert "".join(streamer) == tokenizer.decode(found[0, 4:])
assert len(stats["num_accepted_tokens_per_pos"]) == 2, stats
print("done")
"""


def test_a_folder_works_where_there_is_no_hopskip(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen2")
    write_tokenizer(tmp_path / "model")
    path = hopskip.hf.write_custom_generate(tmp_path / "model", exit_layer=2, num_draft_tokens=3)
    assert path == tmp_path / "model" / "custom_generate" / "generate.py"
    assert "hopskip." not in path.read_text(encoding="utf-8")
    import os

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOPSKIP, str(tmp_path / "model")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("done"), done.stderr


@pytest.mark.parametrize("numbers", [(0, 4), (4, 0), ("4", 4)])
def test_a_folder_of_impossible_numbers_is_refused(tmp_path: Path, numbers: tuple[Any, Any]) -> None:
    with pytest.raises(hopskip.ConfigError, match="it must be a whole number of at least 1"):
        hopskip.hf.write_custom_generate(tmp_path, *numbers)
    assert not list(tmp_path.iterdir())


def test_importing_the_door_imports_nothing_heavy() -> None:
    code = "import sys, hopskip.hf; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
    assert "self_speculative" in dir(hopskip.hf)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hopskip.hf.nothing
