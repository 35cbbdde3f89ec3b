"""The LayerSkip paper's own recipe (arXiv 2404.16710), measured: from scratch, continual and fine-tuned.

    python -m benchmarks.paper_recipe --data FILE [--output runs/paper-recipe] [--minutes 120] [--kinds scratch ...]

FILE holds texts, or prompts with responses (.jsonl, .jsonl.gz, .txt, .parquet). Every kind of training is run by every
arm, for every seed:

    none         ordinary training
    rotational   the paper: layer dropout, cross-entropy of rotating exits, weights e(l)
    gradual      the paper's other curriculum
    kl           ours: as `rotational`, the exits learning the last layer's distribution

Then each layer is measured as an early exit (cross-entropy and accuracy on held-out text; the last one is quality at
full depth), and self-speculation over the model's own plain decoding. `report.json`, `table.md` and `figure.png` are
written anew after every piece. It ends after `--minutes`; run again, it goes on at the last checkpoint. `--tiny` tries
it all in a minute or two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.in_turn import decode_in_turn
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.machine import cpu_name, num_usable_cores
from hopskip.train.base import load_transformers_tokenizer
from hopskip.train.checkpoint import replacing, replacing_file
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.data import IGNORED, Row, collate, make_rows
from hopskip.train.dropout import LayerTaps
from hopskip.train.read import DataConfig, LossOn, read_split
from hopskip.train.recipe import ModelRecipe, Recipe
from hopskip.train.run import run

ARMS = ("none", "rotational", "gradual", "kl")
HOLDOUT_EVERY = 50
END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One of the paper's three settings, and its size here."""

    p_max: float
    e_scale: float
    rotation: int | None
    """None: one less than the model has layers, as the paper trains from scratch."""
    learning_rate: float
    steps: int
    batch: int
    max_length: int
    is_from_scratch: bool = False
    loss_on: LossOn = "all"

    def layerskip(self, arm: str, num_layers: int) -> LayerSkipRecipe:
        """The recipe of an arm."""
        if arm == "none":
            return LayerSkipRecipe(p_max=0.0, e_scale=0.0)
        schedule = "exponential" if self.is_from_scratch else "constant"
        common: dict[str, Any] = {"p_max": self.p_max, "dropout_schedule": schedule, "e_scale": self.e_scale}
        if arm == "gradual":
            return LayerSkipRecipe(curriculum="gradual", **common)
        losses: dict[str, Any] = {"ce_weight": 0.0, "kl_weight": 1.0} if arm == "kl" else {}
        return LayerSkipRecipe(rotation=self.rotation or num_layers - 1, **common, **losses)

    def data(self, file: str) -> DataConfig:
        """Rows: one stream of text, or a question each whose answer is learned. `run` evaluates hardly any."""
        options: dict[str, Any] = {"packing": "blocks"}
        if self.loss_on == "assistant":
            options = {"loss_on": "assistant", "too_long": "drop"}
        return DataConfig(
            train=(file,), holdout_every=HOLDOUT_EVERY, max_eval_rows=2, max_length=self.max_length, **options
        )


# p_max, e_scale, rotation and rate of the paper's 1.5B from scratch, Llama 3 continued, and Llama 1 fine-tuned
KINDS = {
    "scratch": Kind(
        p_max=0.1,
        e_scale=0.2,
        rotation=None,
        learning_rate=8e-4,
        steps=1500,
        batch=16,
        max_length=256,
        is_from_scratch=True,
    ),
    "continual": Kind(p_max=0.1, e_scale=0.1, rotation=8, learning_rate=3e-5, steps=400, batch=4, max_length=256),
    "finetune": Kind(
        p_max=0.1,
        e_scale=1.0,
        rotation=16,
        learning_rate=1e-4,
        steps=400,
        batch=8,
        max_length=256,
        loss_on="assistant",
    ),
}
TINY = {"steps": 6, "batch": 2, "max_length": 256}


class OutOfTimeError(Exception):
    """The budget is spent; what is done is kept."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.minutes is not None:
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(max(1, round(60 * arguments.minutes)))
    pieces = [(kind, arm, seed) for seed in arguments.seeds for kind in arguments.kinds for arm in ARMS]
    try:
        for piece in pieces:
            place = arguments.output / "-".join(map(str, piece))
            if not (place / "result.json").exists():
                print(f"== {place.name}", file=sys.stderr, flush=True)
                result = measure(train(*piece, place, arguments), piece[0], arguments)
                with replacing_file(place / "result.json") as partial:
                    partial.write_text(json.dumps(result, indent=2), encoding="utf-8")
            report(arguments.output)
    except OutOfTimeError:
        print("out of time: run the same command again to go on", file=sys.stderr)
    signal.alarm(0)
    print(json.dumps(report(arguments.output), indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="may be given several times")
    parser.add_argument("--output", type=Path, default=Path("runs/paper-recipe"))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, help="stop after so many; without it, when all is done")
    parser.add_argument("--model", default="default", help="the one that is continued and fine-tuned")
    parser.add_argument("--layers", type=int, default=12, help="of the model from scratch")
    parser.add_argument("--hidden", type=int, default=320, help="of the model from scratch: 15 million weights")
    parser.add_argument("--vocabulary", type=int, default=2048, help="of the model from scratch")
    # see paper_in_small.py: with transformers' 0.02 the layers of so small a model refine one prediction together
    parser.add_argument("--embedding-std", type=float, default=0.7, help="of the model from scratch")
    parser.add_argument("--steps", type=int, help="of every run, instead of each kind's own")
    parser.add_argument("--eval-rows", type=int, default=64)
    parser.add_argument("--tiny", action="store_true", help="few steps on a small model: to see that it works")
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.hidden, arguments.eval_rows = 4, 64, 4
    return arguments


def _stop(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


def kind_of(name: str, arguments: argparse.Namespace) -> Kind:
    values = {**vars(KINDS[name]), **(TINY if arguments.tiny else {})}
    return Kind(**{**values, "steps": arguments.steps or values["steps"]})


def train(name: str, arm: str, seed: int, place: Path, arguments: argparse.Namespace) -> Path:
    """One run, or the rest of it; returns the finished model's folder."""
    kind = kind_of(name, arguments)
    base = str(start(seed, arguments)) if kind.is_from_scratch else arguments.model
    num_layers = arguments.layers if kind.is_from_scratch else num_layers_of(arguments.model)
    training = {
        "max_steps": kind.steps,
        "per_device_train_batch_size": kind.batch,
        "learning_rate": kind.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, kind.steps // 20),
        "weight_decay": 0.1 if kind.is_from_scratch else 0.0,
        "logging_steps": max(1, kind.steps // 60),
        "save_steps": max(1, kind.steps // 20),
        "save_total_limit": 1,
        "seed": seed,
        "use_cpu": True,
        "bf16": True,
    }
    layerskip = kind.layerskip(arm, num_layers)
    recipe = Recipe(
        output=str(place),
        model=ModelRecipe(base=base),
        data=kind.data(source(kind, arguments)),
        layerskip=layerskip,
        training=training,
    )
    folder = place / "model"
    if not folder.exists():
        run(recipe)
        for checkpoint in place.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return folder


def num_layers_of(model: str) -> int:
    from hopskip.train.base import base_config

    number: int = base_config(ModelRecipe(base=model)).num_hidden_layers
    return number


def start(seed: int, arguments: argparse.Namespace) -> Path:
    """The random weights from which every arm of a seed starts, with a tokenizer trained on the training text."""
    folder: Path = arguments.output / f"start-{seed}"
    if folder.exists():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(arguments, held_out=False), trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as partial:
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        (partial / "tokenizer_config.json").write_text(json.dumps(settings))
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=arguments.embedding_std)
        model.save_pretrained(partial)
    return folder


def source(kind: Kind, arguments: argparse.Namespace) -> str:
    """The file to train on: texts, or pairs of prompt and response. Written once from what the user gave."""
    folder: Path = arguments.output / "data"
    if not folder.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        with (
            replacing(folder) as partial,
            (partial / "texts.jsonl").open("w", encoding="utf-8") as written,
            (partial / "pairs.jsonl").open("w", encoding="utf-8") as pairs,
        ):
            for row in read_split(DataConfig(train=tuple(arguments.data)), held_out=False):
                if row.get("text"):
                    print(json.dumps({"text": row["text"]}), file=written)
                elif row.get("prompt") and row.get("response"):
                    print(json.dumps({"text": f"{row['prompt']}\n{row['response']}"}), file=written)
                    print(json.dumps({"prompt": row["prompt"], "response": row["response"]}), file=pairs)
    return str(folder / ("pairs.jsonl" if kind.loss_on == "assistant" else "texts.jsonl"))


def texts(arguments: argparse.Namespace, *, held_out: bool) -> Iterator[str]:
    file = source(KINDS["scratch"], arguments)
    for row in read_split(DataConfig(train=(file,), holdout_every=HOLDOUT_EVERY), held_out=held_out):
        yield row["text"]


def measure(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every layer as an exit, and the speed of self-speculation."""
    kind = kind_of(name, arguments)
    tokenizer = load_transformers_tokenizer(folder)
    held_out = make_rows(kind.data(source(kind, arguments)), tokenizer, held_out=True)
    rows = list(itertools.islice(held_out, arguments.eval_rows))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return {
        "exits": exit_quality(model, rows),
        "decoding": decode(folder, model.config.num_hidden_layers, arguments),
        "settings": {**vars(kind), "machine": cpu_name(), "torch": torch.__version__, "threads": arguments.threads},
    }


@torch.inference_mode()
def exit_quality(model: Any, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Mean cross-entropy and accuracy over the learned tokens, by exit; the last is the whole model."""
    num_layers = model.config.num_hidden_layers
    sums = torch.zeros(num_layers, 2, dtype=torch.float64)
    num_tokens = 0
    taps = LayerTaps(model.model.layers)
    for row in rows:
        batch = collate([row])
        targets_N = batch["labels"][0, 1:]
        where_N = targets_N.ne(IGNORED).nonzero().squeeze(1)
        num_tokens += len(where_N)
        with taps.collect(range(num_layers)):
            model.model(batch["input_ids"], use_cache=False)
            for layer, h_BTD in taps.outputs.items():
                logits_NV = model.lm_head(model.model.norm(h_BTD[0, where_N])).float()
                loss = torch.nn.functional.cross_entropy(logits_NV, targets_N[where_N], reduction="sum")
                sums[layer, 0] += loss
                sums[layer, 1] += logits_NV.argmax(-1).eq(targets_N[where_N]).sum()
    means = (sums / num_tokens).tolist()
    return {str(layer + 1): {"loss": loss, "accuracy": share} for layer, (loss, share) in enumerate(means)}


def decode(folder: Path, num_layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens per second, plain and at a few exits and draft lengths, in turn; all of them write the same."""
    num_prompts, max_new_tokens, repeats = (2, 8, 1) if arguments.tiny else (8, 96, 3)
    prompts = [text[:200] for text in itertools.islice(texts(arguments, held_out=True), num_prompts)]
    settings: dict[str, SpeculativeConfig] = {"plain": SpeculativeConfig(draft="none")}
    for exit_layer in sorted({max(1, num_layers // part) for part in (8, 4, 3, 2)}):
        for length in (2, 4):
            settings[f"exit {exit_layer}, {length} draft tokens"] = SpeculativeConfig(
                draft="early-exit", exit_layer=exit_layer, num_draft_tokens=length
            )
    options: dict[str, Any] = {"threads": arguments.threads, "max_num_seqs": 1}
    engines = {name: LLM(folder, speculative=speculative, **options) for name, speculative in settings.items()}
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    measured = decode_in_turn(engines, prompts, params, repeats=repeats)
    best = max((name for name in settings if name != "plain"), key=lambda name: measured["speedup"][name])
    return {**measured, "best": best, "best_speedup": measured["speedup"][best]}


def report(output: Path) -> dict[str, Any]:
    """Table, figure and summary of whatever is done: means over seeds, and their standard deviation."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted(output.glob("*-*-*/result.json")):
        kind, arm, _ = path.parent.name.split("-")
        found.setdefault(kind, {}).setdefault(arm, []).append(json.loads(path.read_text(encoding="utf-8")))
    summary: dict[str, Any] = {}
    for kind, arms in found.items():
        for arm, results in sorted(arms.items(), key=lambda item: ARMS.index(item[0])):
            exits = {
                layer: {value: spread([r["exits"][layer][value] for r in results]) for value in ("loss", "accuracy")}
                for layer in results[0]["exits"]
            }
            speedup = spread([r["decoding"]["best_speedup"] for r in results])
            summary.setdefault(kind, {})[arm] = {"seeds": len(results), "exits": exits, "best_speedup": speedup}
    if summary:
        for name, text in (("report.json", json.dumps(summary, indent=2)), ("table.md", table(summary))):
            (output / name).write_text(text, encoding="utf-8")
        draw(summary, output / "figure.png")
    return summary


def spread(values: list[float]) -> list[float]:
    """Mean and standard deviation."""
    return [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]


def table(summary: Mapping[str, Any]) -> str:
    """In Markdown: a quarter, half and all of the layers."""
    lines = [
        "| training | arm | seeds | loss at a quarter | at half | at full depth | accuracy at half | at full depth "
        "| best self-speculation |",
        "|" + "---|" * 9,
    ]
    for kind, arms in summary.items():
        for arm, values in arms.items():
            last = max(map(int, values["exits"]))
            quarter, half, full = (values["exits"][str(max(1, last // part))] for part in (4, 2, 1))
            cells = [quarter["loss"], half["loss"], full["loss"], half["accuracy"], full["accuracy"]]
            cells.append(values["best_speedup"])
            shown = " | ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in cells)
            lines.append(f"| {kind} | {arm} | {values['seeds']} | {shown} x |")
    return "\n".join(lines) + "\n"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(summary), 4.5), layout="constrained")
    panels = figure.subplots(1, len(summary), squeeze=False)[0]
    for axes, (kind, arms) in zip(panels, summary.items(), strict=True):
        for arm, values in arms.items():
            layers = sorted(map(int, values["exits"]))
            means, deviations = zip(*(values["exits"][str(layer)]["loss"] for layer in layers), strict=True)
            axes.errorbar(layers, means, deviations, marker=".", capsize=2, label=f"{arm} ({values['seeds']} seeds)")
        axes.set_title(kind)
        axes.set_xlabel("exit layer")
        axes.legend(fontsize="small")
    panels[0].set_ylabel("cross-entropy on held-out text")
    figure.savefig(path)


if __name__ == "__main__":
    main()
