"""The trained exit and the native engine behind `generate` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hopskip.hf  # noqa: E402
from hopskip import ConfigError, SamplingParams, SpeculativeConfig  # noqa: E402
from hopskip.backends.native.isa import obstacle  # noqa: E402
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from hopskip.checkpoint.trained_exit import ExitConfig  # noqa: E402
from tests.test_exit_branch import load, own_branch, random_branch  # noqa: E402
from tests.test_hf import LENGTH, EndsAt, Streamer, batch, prepared  # noqa: E402
from tests.tiny import make_model, write_checkpoint  # noqa: E402

native = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("hf")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def model() -> Any:
    model = make_model("llama3-gqa")  # what `write_checkpoint` writes
    model.generation_config.pad_token_id = 3
    model.generation_config.eos_token_id = None
    return model


def compare(model: Any, inputs: dict[str, Any], own: dict[str, Any], **asked: Any) -> dict[str, Any]:
    """Both texts are the same; returns the counts."""
    stats: dict[str, Any] = {}
    given = {"max_new_tokens": LENGTH, **inputs, **asked}
    torch.manual_seed(11)
    plain = model.generate(**given)
    torch.manual_seed(11)
    found = model.generate(**given, custom_generate=hopskip.hf.self_speculative, draft_stats=stats, **own)
    assert torch.equal(plain, found)
    return stats


# -- trained exits -----------------------------------------------------------------------------------------------------


def test_the_models_own_last_layer_drafts_what_it_says(model: Any, checkpoint: Checkpoint) -> None:
    """An exit that starts after all layers but the last, and has that one: always accepted, one text or several."""
    for size in (1, 4):
        stats = compare(model, batch(size), {"exit_branch": own_branch(checkpoint)})
        assert stats["num_accepted_tokens"] == stats["num_draft_tokens"] > 0
        assert len(stats["num_accepted_tokens_per_pos"]) == 4


EXITS = {
    "features": ExitConfig(start=0, num_layers=1, features=(1, 2, 3)),
    "two layers": ExitConfig(start=0, num_layers=2, features=(2,)),
    "start and features": ExitConfig(start=1, num_layers=1, features=(1, 3)),
    "token alone": ExitConfig(start=0, num_layers=1),
    "start alone": ExitConfig(start=2, num_layers=1),
    "no layers": ExitConfig(start=2, num_layers=0),
}


@pytest.mark.parametrize("name", EXITS)
def test_drafts_are_those_of_our_own_engine(model: Any, checkpoint: Checkpoint, name: str) -> None:
    """Counts of accepted tokens, place by place, are the engine's."""
    from hopskip.engine import make_engine
    from hopskip.sequence import Request

    _, trained = random_branch(checkpoint, EXITS[name])
    inputs = batch(1)
    stats = compare(model, inputs, {"exit_branch": trained}, max_new_tokens=40)
    backend = load(checkpoint, "torch")
    backend.attach_exit(trained)
    engine = make_engine(backend, SpeculativeConfig(draft="exit-branch", num_draft_tokens=3, num_runner_ups=0))
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    sequence = engine.add(Request(inputs["input_ids"][0].tolist(), params))
    while engine.has_work:
        engine.step()
    theirs = sequence.stats
    assert stats["num_draft_tokens"] == theirs.num_draft_tokens
    assert stats["num_accepted_tokens_per_pos"][: len(theirs.num_accepted_tokens_per_pos)] == (
        theirs.num_accepted_tokens_per_pos
    )


@pytest.mark.parametrize("name", EXITS)
def test_several_texts_with_an_exit(model: Any, checkpoint: Checkpoint, name: str) -> None:
    """Padding on the left, draws, a cache that is in use, and the prompt read in parts."""
    _, trained = random_branch(checkpoint, EXITS[name])
    compare(model, batch(4), {"exit_branch": trained}, do_sample=True, temperature=0.8, prefill_chunk_size=4)
    inputs, cache = {"input_ids": batch(1)["input_ids"].repeat(2, 1)}, transformers.DynamicCache()
    model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
    own = {"custom_generate": hopskip.hf.self_speculative, "exit_branch": trained, "max_new_tokens": 9}
    found = model.generate(**inputs, past_key_values=cache, **own)
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=9))


def test_padding_changes_no_draft(model: Any, checkpoint: Checkpoint) -> None:
    """A prompt with padding before it is drafted for as without."""
    _, trained = random_branch(checkpoint, EXITS["start and features"])
    ids = batch(1)["input_ids"]
    padded = torch.cat((torch.full((1, 5), 3), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)), dim=1)
    counts = [
        compare(model, inputs, {"exit_branch": trained}, max_new_tokens=40)
        for inputs in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask})
    ]
    assert counts[0] == counts[1]


def test_an_exit_comes_from_its_folder(model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    own_branch(checkpoint).save(tmp_path)
    stats = compare(model, batch(1), {"exit_branch": str(tmp_path), "num_draft_tokens": 2})
    assert len(stats["num_accepted_tokens_per_pos"]) == 2
    with pytest.raises(hopskip.CheckpointError, match="is not an exit"):
        compare(model, batch(1), {"exit_branch": tmp_path / "nowhere"})


def test_an_exit_of_another_model_is_refused(model: Any, checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="use the model that it was trained for"):
        compare(prepared(make_model("qwen3")), batch(1), {"exit_branch": own_branch(checkpoint)})


# -- the native engine -------------------------------------------------------------------------------------------------

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.4},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": list(range(4, 100))},
    "min_length": {"min_length": 14, "eos_token_id": list(range(4, 100))},
    "bad words": {"bad_words_ids": [[7], [9]]},
    "suppressed tokens": {"suppress_tokens": list(range(0, 320, 3))},
    "sequence bias": {"sequence_bias": [[[5], 3.0]]},
    "ends": {"eos_token_id": list(range(4, 60))},
    "own criterion": {"stopping_criteria": [EndsAt()], "eos_token_id": 7},
}


@native
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", PARAMETERS)
def test_native_texts_are_those_of_plain_generate(model: Any, name: str, size: int) -> None:
    inputs = batch(size)
    if name == "repetition penalty":  # padding is no token of the text here
        inputs = {key: value[:1].repeat(size, 1) for key, value in inputs.items()}
    stats = compare(model, inputs, {"engine": "native", "exit_layer": 2, "num_draft_tokens": 3}, **PARAMETERS[name])
    assert stats["num_draft_tokens"] > 0 or "eos_token_id" in PARAMETERS[name]  # which may come at once


@native
@pytest.mark.parametrize("family", ["llama-yarn", "qwen2.5-tied", "qwen3", "mistral-window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_packs_every_family_and_precision(family: str, dtype: str) -> None:
    model = prepared(make_model(family)).to(getattr(torch, dtype))
    own = {"engine": "native", "exit_layer": 2, "precision": "float32"}
    asked = {**batch(1), "max_new_tokens": 6}
    found = model.generate(**asked, custom_generate=hopskip.hf.self_speculative, **own)
    assert torch.equal(found, model.float().generate(**asked))


@native
def test_native_takes_trained_exits_and_its_own_choice(model: Any, checkpoint: Checkpoint) -> None:
    stats = compare(model, batch(2), {"engine": "native", "exit_branch": own_branch(checkpoint)})
    assert stats["num_accepted_tokens"] == stats["num_draft_tokens"] > 0
    compare(model, batch(2), {"engine": "native"})


@native
def test_native_draws_by_the_seed_of_torch(model: Any) -> None:
    asked = {**batch(2), "do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    own = {"custom_generate": hopskip.hf.self_speculative, "engine": "native", "max_new_tokens": 12}
    texts = []
    for seed, exit_layer in ((1, 1), (1, 2), (2, 2)):
        torch.manual_seed(seed)
        texts.append(model.generate(**asked, **own, exit_layer=exit_layer))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[1], texts[2])


@native
def test_native_packs_anew_what_has_been_trained(model: Any) -> None:
    own = prepared(make_model("llama2-mha"))
    compare(own, batch(1), {"engine": "native", "exit_layer": 2})
    with torch.no_grad():
        own.model.layers[0].mlp.up_proj.weight.mul_(-1)
    compare(own, batch(1), {"engine": "native", "exit_layer": 2})


@native
def test_native_streams_and_returns_a_dict(model: Any) -> None:
    plain, found = Streamer(), Streamer()
    asked = {**batch(1), "max_new_tokens": 6, "eos_token_id": 5}
    text = model.generate(**asked, streamer=plain)
    own = {"custom_generate": hopskip.hf.self_speculative, "engine": "native", "exit_layer": 2}
    result = model.generate(**asked, **own, token_streamer=found, return_dict_in_generate=True)
    assert plain.got == found.got
    assert torch.equal(result.sequences, text)


@native
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"no_repeat_ngram_size": 2}, "nothing like NoRepeatNGramLogitsProcessor; leave it out, or use engine 'torch'"),
        ({"bad_words_ids": [[7, 8]]}, "nothing like NoBadWordsLogitsProcessor"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores needs engine 'torch'"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits needs engine 'torch'"),
        ({"precision": "q5"}, "precision is 'q5'; choose one of auto, float32"),
        ({"token_streamer": Streamer()}, "a streamer takes one text, but there are 2"),
        ({"exit_layer": 3}, "exit_layer is 3"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0"),
    ],
)
def test_native_refuses_what_it_does_not_have(model: Any, asked: dict[str, Any], message: str) -> None:
    own = {"custom_generate": hopskip.hf.self_speculative, "engine": "native", "max_new_tokens": 4}
    with pytest.raises(ValueError, match=message):
        model.generate(**batch(2), **{**own, **asked})


@native
def test_native_refuses_weights_that_are_not_plain(model: Any) -> None:
    other = make_model("llama2-mha")
    other.model.layers[0].mlp.up_proj = torch.nn.Sequential(other.model.layers[0].mlp.up_proj)
    own = {"custom_generate": hopskip.hf.self_speculative, "engine": "native", "max_new_tokens": 4}
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.up_proj\.weight are not plain weights"):
        other.generate(**batch(1), **own)


@native
def test_native_refuses_a_cache_in_use(model: Any) -> None:
    cache = transformers.DynamicCache()
    model(batch(1)["input_ids"][:, :4], past_key_values=cache)
    own = {"custom_generate": hopskip.hf.self_speculative, "engine": "native", "max_new_tokens": 4}
    with pytest.raises(ConfigError, match="past_key_values needs engine 'torch'"):
        model.generate(**batch(1), past_key_values=cache, **own)
