"""The LayerSkip paper in small: one model from scratch with the recipe and one without, on two CPU cores.

    python -m benchmarks.paper_in_small --text FILE [--text FILE ...] [--output runs/paper-in-small]

Trains a tokenizer and two models of 12 layers, which start from the same weights, on the text (.txt, .jsonl with `text`
or `prompt` and `response`, .parquet). Then compares the perplexity of every exit on held-out text, and the speed of
self-speculative decoding with that of plain decoding. Prints one JSON object and draws `figure.png`. Run again after an
interruption: it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.in_turn import decode_in_turn
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.machine import num_usable_cores
from hopskip.train.checkpoint import replacing
from hopskip.train.curriculum import LayerSkipRecipe
from hopskip.train.read import DataConfig, read_split
from hopskip.train.recipe import ModelRecipe, Recipe
from hopskip.train.report import measured_exits, read_log
from hopskip.train.run import run

NUM_LAYERS = 12
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ROW_TOKENS = 128
END = "<|endoftext|>"
RECIPES = {
    # Two exits in every step, distilled from the last layer: accepted more often than with all exits in rotation, at
    # the same price for the last layer.
    "recipe": LayerSkipRecipe(
        p_max=0.05,
        dropout_schedule="exponential",
        e_scale=0.04,
        curriculum="all",
        exits=[4, 6],
        ce_weight=0,
        kl_weight=1,
    ),
    "baseline": LayerSkipRecipe(p_max=0.0, e_scale=0.0),
}
HOLDOUT_EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, metavar="FILE", help="may be given several times")
    parser.add_argument("--output", type=Path, default=Path("runs/paper-in-small"))
    parser.add_argument("--steps", type=int, default=800, help="for each model")
    parser.add_argument("--batch", type=int, default=8, help=f"rows of {ROW_TOKENS} tokens a step")
    parser.add_argument("--vocabulary", type=int, default=1024)
    # With transformers' 0.02 and so few steps, all layers refine one and the same prediction, and leaving early costs
    # little even without the recipe. With a larger one, as in a model that was trained for long, the residual stream
    # first says which token was read, and only what the layers add says which comes next.
    parser.add_argument("--embedding-std", type=float, default=0.7, help="of the first weights of the embedding")
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sources = DataConfig(train=tuple(arguments.text), holdout_every=HOLDOUT_EVERY)
    start = prepare(sources, arguments)
    folders = {name: train(name, start, sources, arguments) for name in RECIPES}
    exits = {name: exit_perplexities(folder) for name, folder in folders.items()}
    speeds = decode(folders["recipe"] / "model", sources, arguments.threads)
    draw(exits, arguments.output / "figure.png")
    middle = NUM_LAYERS // 2
    report = {
        "perplexity": exits,
        "middle_layer_improvement": exits["baseline"][middle] / exits["recipe"][middle],
        "last_layer_ratio": exits["recipe"][NUM_LAYERS] / exits["baseline"][NUM_LAYERS],
        "decoding": speeds,
        "steps": arguments.steps,
        "tokens": arguments.steps * arguments.batch * ROW_TOKENS,
        "embedding_std": arguments.embedding_std,
        "threads": arguments.threads,
    }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


def prepare(sources: DataConfig, arguments: argparse.Namespace) -> Path:
    """A tokenizer trained on the training text, and the random weights from which both models start."""
    folder: Path = arguments.output / "start"
    if folder.exists():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(sources, held_out=False), trainer)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as partial:
        tokenizer.save(str(partial / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        (partial / "tokenizer_config.json").write_text(json.dumps(settings))
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=tokenizer.get_vocab_size()))
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=arguments.embedding_std)
        model.save_pretrained(partial)
    return folder


def texts(sources: DataConfig, *, held_out: bool) -> Iterator[str]:
    for row in read_split(sources, held_out=held_out):
        yield row["text"] if "text" in row else f"{row['prompt']}\n{row['response']}"


def train(name: str, start: Path, sources: DataConfig, arguments: argparse.Namespace) -> Path:
    """One model, with or without the recipe; everything else is the same."""
    folder: Path = arguments.output / name
    steps = arguments.steps
    if (folder / "model").exists():
        return folder
    print(f"training: {name}", file=sys.stderr)
    data = DataConfig(
        train=sources.train, holdout_every=HOLDOUT_EVERY, max_eval_rows=64, packing="blocks", max_length=ROW_TOKENS
    )
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.1,
        "logging_steps": max(1, steps // 60),
        "save_steps": max(1, steps // 10),
        "save_total_limit": 1,
        "use_cpu": True,
        "bf16": True,
    }
    run(
        Recipe(
            output=str(folder),
            model=ModelRecipe(base=str(start)),
            data=data,
            layerskip=RECIPES[name],
            training=training,
        )
    )
    return folder


def exit_perplexities(folder: Path) -> dict[int, float]:
    """On held-out text, by exit, the last layer included."""
    log = read_log(folder / "log.jsonl")
    losses = {e: loss for e, (loss, _) in measured_exits(log, NUM_LAYERS).items()}
    losses[NUM_LAYERS] = log[-1]["eval_loss"]
    return {e: math.exp(loss) for e, loss in losses.items()}


def decode(model: Path, sources: DataConfig, threads: int) -> dict[str, Any]:
    """Greedy tokens per second, plain and at the best exit and length of a few; in turn, the median of five each."""
    rows = [text[:200] for text, _ in zip(texts(sources, held_out=True), range(8), strict=False)]
    settings: dict[str, SpeculativeConfig] = {"plain": SpeculativeConfig(draft="none")}
    for exit_layer in (3, 4):
        for length in (3, 4, 6):
            settings[f"exit {exit_layer}, {length} draft tokens"] = SpeculativeConfig(
                draft="early-exit", exit_layer=exit_layer, num_draft_tokens=length
            )
    params = SamplingParams(max_new_tokens=128, ignore_eos=True)
    engines = {name: LLM(model, speculative=s, threads=threads, max_num_seqs=1) for name, s in settings.items()}
    measured = decode_in_turn(engines, rows, params, repeats=5)
    best = max(settings, key=lambda name: measured["speedup"][name])
    return {**measured, "best": best, "best_speedup": measured["speedup"][best]}


def draw(exits: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in exits.items():
        axes.semilogy(list(values), list(values.values()), "o-", label=name)
    axes.set_xlabel("exit layer")
    axes.set_ylabel("perplexity on held-out text")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
