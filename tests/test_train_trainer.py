"""`LayerSkipTrainer` and its mixin: what a model is outside of the training loss, and what a Trainer otherwise does."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hopskip.errors import ConfigError
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import collate
from hopskip.train.dropout import LayerTaps
from hopskip.train.supported import check_arguments, check_model
from hopskip.train.trainer import LayerSkipConfig, LayerSkipMixin, LayerSkipTrainer
from tests.tiny import make_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:(transformers|accelerate|peft|trl)")
EVERYTHING = LayerSkipRecipe(p_max=0.9, e_scale=1.0, curriculum="all")


def rows(number: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(3, 320, (length - n % 4,), generator=generator) for n in range(number)]
    return [{"input_ids": ids, "labels": torch.cat((torch.tensor([-100]), ids[1:]))} for ids in made]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**settings(folder, **changes))


def trainer_of(folder: Path, model: Any = None, recipe: LayerSkipRecipe = EVERYTHING, **options: Any) -> Any:
    changes = options.pop("arguments", {})
    kind = options.pop("kind", LayerSkipTrainer)
    data = {"train_dataset": rows(), "data_collator": collate, **options}
    return kind(model or make_model("llama3-gqa"), arguments(folder, **changes), layerskip=recipe, **data)


def assert_untouched(model: Any) -> None:
    """The same, bit for bit, as a fresh copy with its weights, at any batch size, with labels and in `generate`."""
    fresh = make_model("llama3-gqa")
    fresh.load_state_dict(model.state_dict())
    fresh.train(model.training)
    with torch.no_grad():
        for size in (1, 3, 4):
            ids = torch.stack([row["input_ids"][:9] for row in rows(size)])
            mine, theirs = model(ids, labels=ids), fresh(ids, labels=ids)
            assert torch.equal(mine.logits, theirs.logits)
            assert torch.equal(mine.loss, theirs.loss)
            if model.training and getattr(model.model.layers[0], "gradient_checkpointing", False):
                continue  # with which transformers cannot generate
            assert torch.equal(
                *(m.generate(ids, attention_mask=ids > 0, max_new_tokens=4, do_sample=False) for m in (model, fresh))
            )


@pytest.mark.parametrize("recomputes", [False, True])
def test_nothing_of_the_recipe_outlives_a_step(recomputes: bool, tmp_path: Path) -> None:
    seen = set()

    class Looks(TrainerCallback):  # type: ignore[misc]
        def on_event(self, event: str, model: Any) -> None:
            seen.add(event)
            assert_untouched(model)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_event("step begin", kwargs["model"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_event("optimizer", kwargs["model"])

        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_event("evaluation", kwargs["model"])

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.on_event("log", kwargs["model"])

    model: Any = make_model("llama3-gqa")
    attributes = [set(vars(module)) for module in model.modules()]
    trainer = trainer_of(
        tmp_path,
        model,
        eval_dataset=rows(3),
        callbacks=[Looks()],
        arguments={"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": recomputes},
    )
    trainer.train()
    assert seen == {"step begin", "optimizer", "evaluation", "log"}
    for mode in (True, False):
        assert_untouched(model.train(mode))
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    if not recomputes:  # which leaves attributes of its own, as accelerate does
        left = [set(vars(module)) - {"_is_accelerate_prepared"} for module in model.modules()]
        assert left == attributes
    assert not model.model._forward_hooks


def test_a_failed_step_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fails(Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            super().compute_loss(*args, **kwargs)
            raise RuntimeError("out of memory")

    class Both(LayerSkipMixin, Fails):
        pass

    trainer = trainer_of(tmp_path, kind=Both)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_untouched(trainer.model)
    assert "_loss_function" not in vars(trainer.model)


def test_what_stood_in_a_layers_place_comes_back() -> None:
    """Another library's own forward on the instance, as accelerate's hooks set it, is called and put back."""
    model: Any = make_model("llama3-gqa")
    layer, calls = model.model.layers[1], []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return LlamaDecoderLayer.forward(layer, *args, **kwargs)

    layer.forward = own
    taps = LayerTaps(model.model.layers)
    with taps.collect([1]):
        model(torch.zeros(2, 3, dtype=torch.long))
        assert 1 in taps.outputs
    assert calls == [1]
    assert layer.forward is own
    assert not taps.outputs


def test_a_loss_function_of_the_users_comes_back(tmp_path: Path) -> None:
    model: Any = make_model("llama3-gqa")
    model.loss_function = lambda **kwargs: kwargs["logits"].sum()
    mine = model.loss_function
    trainer_of(tmp_path, model).train()
    assert model.loss_function is mine


def test_the_callers_arguments_stay_as_they_are(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    before = copy.deepcopy(args.to_dict())
    LayerSkipTrainer(make_model("llama3-gqa"), args, train_dataset=rows(), data_collator=collate).train()
    assert args.to_dict() == before


def test_metrics_are_computed(tmp_path: Path) -> None:
    """`compute_metrics` sees all logits, as with a plain Trainer, in evaluation and prediction."""
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        hits = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits.mean())}

    model: Any = make_model("llama3-gqa")
    same_length = [{name: value[:9] for name, value in row.items()} for row in rows(5)]
    ours, theirs = (
        kind(model, arguments(tmp_path), data_collator=collate, compute_metrics=compute_metrics)
        for kind in (LayerSkipTrainer, Trainer)
    )
    mine, expected = ours.evaluate(same_length), theirs.evaluate(same_length)
    assert mine["eval_accuracy"] == expected["eval_accuracy"] > 0
    assert seen == [(5, 9, 320)] * 2
    predicted = ours.predict(same_length)
    torch.testing.assert_close(
        torch.tensor(predicted.predictions), torch.tensor(theirs.predict(same_length).predictions)
    )
    assert predicted.metrics["test_exit1_loss"] > 0


def test_a_model_made_by_the_trainer(tmp_path: Path) -> None:
    """As a search for settings makes one for every trial."""
    options: dict[str, Any] = {"train_dataset": rows(), "data_collator": collate, "layerskip": EVERYTHING}
    trainer = LayerSkipTrainer(None, arguments(tmp_path), model_init=lambda: make_model("llama3-gqa"), **options)
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert len([line for line in trainer.state.log_history if "exit2_loss" in line]) == 3
    assert_untouched(trainer.model)


def test_columns_that_the_model_does_not_take_are_left_out(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [
            {"input_ids": row["input_ids"][:9].tolist(), "labels": row["labels"][:9].tolist(), "text": "x"}
            for row in rows()
        ]
    )
    trainer = trainer_of(tmp_path, train_dataset=table, data_collator=None)
    trainer.train()
    assert trainer.state.global_step == 3


def test_every_data_set_of_an_evaluation_has_its_exits(tmp_path: Path) -> None:
    sets = {"short": rows(2, 6), "long": rows(5)}
    trainer = trainer_of(tmp_path, eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, own in sets.items():
        alone = trainer.evaluate(own)
        for key in ("loss", "exit1_loss", "exit2_agreement"):
            assert metrics[f"eval_{name}_{key}"] == alone[f"eval_{key}"]
        assert f"eval_{name}_exit3_loss" not in metrics


class Weighted(Trainer):  # type: ignore[misc]
    """A trainer with a loss of its own: the model's, times three."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        return (3 * result[0], result[1]) if isinstance(result, tuple) else 3 * result


class LayerSkipWeighted(LayerSkipMixin, Weighted):
    pass


class Passes(Trainer):  # type: ignore[misc]
    """The plain loss, but by a method of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


class LayerSkipPasses(LayerSkipMixin, Passes):
    pass


@pytest.mark.parametrize("recipe", [EVERYTHING, LayerSkipRecipe(p_max=0.0, e_scale=1.0, kl_weight=0.5, rotation=2)])
def test_over_a_trainer_with_a_loss_of_its_own(recipe: LayerSkipRecipe, tmp_path: Path) -> None:
    """The exits are added to it: where it is the plain loss, the runs are the same."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    plain, other = (
        trainer_of(tmp_path, recipe=recipe, kind=kind, arguments=changes)
        for kind in (LayerSkipTrainer, LayerSkipPasses)
    )
    for trainer in (plain, other):
        trainer.train()
    mine, theirs = ([line for line in t.state.log_history if "loss" in line] for t in (other, plain))
    assert len(mine) == 4
    for line, expected in zip(mine, theirs, strict=True):
        for name in expected.keys() - {"tokens_per_second", "mfu"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-4), name
    for mine_weights, their_weights in zip(other.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine_weights, their_weights, rtol=1e-3, atol=1e-5)


def test_the_other_trainers_loss_is_the_last_layers(tmp_path: Path) -> None:
    """Without dropout: w_last times it, and the exits' part once; in evaluation it alone."""
    recipe = LayerSkipRecipe(p_max=0.0, e_scale=1.0, curriculum="all")
    batch = collate(rows(3))
    losses = {}
    for kind in (LayerSkipTrainer, LayerSkipWeighted, Weighted):
        options = {} if kind is Weighted else {"layerskip": recipe}
        trainer = kind(make_model("llama3-gqa"), arguments(tmp_path), data_collator=collate, **options)
        for mode in (True, False):
            trainer.model.train(mode)
            trainer.state.max_steps = 3
            losses[kind, mode] = trainer.compute_loss(trainer.model, batch).item()
    last = recipe.loss_weights(0, 3, 3)[-1]
    own = losses[Weighted, True]
    assert losses[LayerSkipWeighted, True] == pytest.approx(losses[LayerSkipTrainer, True] + last * own * 2 / 3)
    assert losses[LayerSkipWeighted, False] == pytest.approx(own)
    evaluated = trainer_of(tmp_path, kind=LayerSkipWeighted).evaluate(rows(3))
    assert evaluated["eval_loss"] == pytest.approx(3 * evaluated["eval_exit3_loss"], rel=1e-4)


def test_training_arguments_are_the_recipe(tmp_path: Path) -> None:
    """For parsers and sweeps; a changed argument counts."""
    flags = ["--output_dir", str(tmp_path), "--p_max", "0.3", "--curriculum", "all", "--exits", "2", "--exit_weights"]
    flags += [
        "0.7",
        "--max_steps",
        "2",
        "--use_cpu",
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--disable_tqdm",
        "1",
    ]
    (config,) = HfArgumentParser(LayerSkipConfig).parse_args_into_dataclasses(flags)
    assert (config.p_max, config.curriculum, config.exits, config.exit_weights) == (0.3, "all", [2], [0.7])
    trainer = LayerSkipTrainer(make_model("llama3-gqa"), config, train_dataset=rows(), data_collator=collate)
    trainer.train()
    assert {"exit2_loss", "exit3_loss"} < trainer.state.log_history[0].keys()
    assert "exit1_loss" not in trainer.state.log_history[0]
    trainer.args.exits, trainer.args.exit_weights = [1], [0.5]
    trainer.train()
    assert "exit1_loss" in trainer.state.log_history[0]
    with pytest.raises(ConfigError, match=r"p_max is 1\.5"):
        LayerSkipConfig(output_dir=str(tmp_path), p_max=1.5)
    with pytest.raises(ConfigError, match="given twice"):
        LayerSkipTrainer(make_model("llama3-gqa"), config, layerskip=EVERYTHING)


def test_another_trainers_arguments_keep_their_defaults() -> None:
    @dataclass
    class Theirs(TrainingArguments):  # type: ignore[misc]
        learning_rate: float = 2e-5

    @dataclass
    class Both(Theirs, LayerSkipConfig):
        pass

    defaults = {field.name: field.default for field in fields(Both)}
    assert (defaults["learning_rate"], defaults["p_max"]) == (2e-5, 0.1)
    with pytest.raises(ConfigError, match="e_scale is -1"):
        Both(output_dir="x", e_scale=-1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1: the exits learn without it"),
        ({"torch_compile": True}, "torch_compile does not work here"),
        ({"use_liger_kernel": True}, "use_liger_kernel replaces the forward pass"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant=True",
        ),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version 1 flattens the weights"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "fsdp needs several processes"),
        ({"report_to": "tensorboard"}, "report_to: .*tensorboard"),
        ({"report_to": "nobody"}, "report_to: nobody is not supported"),
        ({"fp16": True}, "fp16 needs a GPU"),
        ({"optim": "grokadamw"}, "optim 'grokadamw': .*install grokadamw"),
        ({"optim": "galore_adamw"}, "optim 'galore_adamw': .*install `galore_torch`"),
    ],
)
def test_arguments_that_would_train_something_else(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, arguments=changes)


def test_an_optimizer_that_needs_the_model_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks(*_: Any) -> None:
        raise ValueError("You need to pass a model")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", asks)
    check_arguments(arguments(tmp_path))


def test_several_gpus_in_one_process(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"2 GPUs are visible to one process.*torchrun"):
        LayerSkipTrainer(make_model("llama3-gqa"), args)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed_plugin", object(), "deepspeed does not work here.*FSDP2"),
        ("parallelism_config", object(), "parallelism_config does not work here.*FSDP2"),
    ],
)
def test_other_ways_to_share_a_model(name: str, value: Any, message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=message):
        LayerSkipTrainer(make_model("llama3-gqa"), args)


def test_a_model_that_is_shared_otherwise(tmp_path: Path) -> None:
    for owner, name, value in (
        (make_model("llama3-gqa"), "_tp_size", 2),
        (None, "is_deepspeed_enabled", True),
        (None, "is_distributed_loading_by_transformers", True),
    ):
        trainer = trainer_of(tmp_path)
        if owner is not None:
            trainer.model = owner
        setattr(owner or trainer, name, value)
        with pytest.raises(ConfigError, match="tensor and context parallelism do not work"):
            check_model(trainer)
    trainer = trainer_of(tmp_path)
    trainer.is_model_parallel = True
    with pytest.raises(ConfigError, match="spread over several GPUs by one process"):
        check_model(trainer)


def test_a_loss_that_leaves_the_exits_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compute_loss_func would leave the exits without a loss"):
        trainer_of(tmp_path, compute_loss_func=lambda outputs, labels, **kwargs: outputs.logits.sum())
    model: Any = make_model("llama3-gqa")
    plain = type(model).forward
    model.forward = lambda labels=None, **kwargs: {"loss": plain(model, **kwargs).logits.mean()}
    with pytest.raises(ConfigError, match="forward pass was replaced"):
        trainer_of(tmp_path, model, arguments={"remove_unused_columns": False}).train()
    with pytest.raises(ConfigError, match=r"a batch has no labels, but \['input_ids'\]"):
        trainer_of(
            tmp_path, train_dataset=[{"input_ids": row["input_ids"][:9]} for row in rows()], data_collator=None
        ).train()


def test_half_precision_weights_are_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="most updates are smaller than half a step"):
        trainer_of(tmp_path, make_model("llama3-gqa").bfloat16())


def test_packed_documents_under_flash_attention(tmp_path: Path) -> None:
    """transformers keeps them apart in batches of one row only."""
    model: Any = make_model("llama3-gqa")
    packed = [{**row, "position_ids": torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])} for row in rows(2)]
    packed = [{name: value[:9] for name, value in row.items()} for row in packed]
    trainer = trainer_of(tmp_path, model)
    trainer.state.max_steps = 3
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2 keeps packed documents apart in batches of one row"):
        trainer.compute_loss(model, collate(packed))
    for batch in (collate(packed[:1]), collate(rows(2))):
        model.config._attn_implementation = "eager"
        assert trainer.compute_loss(model, batch).isfinite()


def test_an_adapter_on_tied_matrices(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for target, name in (("lm_head", "lm_head"), ("embed_tokens", "embed_tokens")):
        with warnings.catch_warnings():  # peft warns of it too
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(make_model("llama3-gqa"), peft.LoraConfig(target_modules=["q_proj", target]))
        with pytest.raises(ConfigError, match=f"an adapter of '{name}' cannot be merged"):
            trainer_of(tmp_path, model)


def test_an_adapter_on_a_head_of_its_own(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"], r=2)
    model: Any = peft.get_peft_model(make_model("qwen2"), config)
    trainer = trainer_of(tmp_path, model, LayerSkipRecipe(p_max=0.0, e_scale=1.0))
    trainer.train()
    ids = rows(1)[0]["input_ids"][None]
    trained = model.eval()(ids).logits
    assert all(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name and "lm_head" in name)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"neftune_noise_alpha": 5.0}, {"auto_find_batch_size": True}, {"full_determinism": True}]
)
def test_other_arguments_of_the_trainer(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, arguments=changes)
    trainer.train()
    assert trainer.state.global_step == 3
    assert_untouched(trainer.model)
