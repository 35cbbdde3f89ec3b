"""The paper's fine-tuning experiment in small: SmolLM2-135M on grade-school arithmetic, with and without the recipe.

    python -m benchmarks.gsm8k --data FILE.jsonl [--where src=gsm8k] [--output runs/gsm8k] [SECTION.KEY=VALUE ...]

Trains by the recipe gsm8k-finetune (overrides go to both trainings), then measures on both models: the accuracy of
greedy answers to the held-out problems (every 15th of the data), and acceptance and speed on the gsm8k prompts that
come with hopskip. Which tokens the recipe's exit should draft, and how many, `hopskip train exit` finds. Prints one
JSON object. Run again after an interruption: it goes on where it was.

A line of FILE is {"prompt": ..., "response": ...}, the response ending in its number ("The answer is 72", "#### 72").
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.in_turn import decode_in_turn
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.machine import num_usable_cores
from hopskip.prompts import Prompt, load_prompts
from hopskip.train.exit.recipe import Branch, ExitRecipe, PromptsRecipe, SearchRecipe
from hopskip.train.exit.run import run as train_exit
from hopskip.train.read import read_split
from hopskip.train.recipe import RECIPES, Recipe, load_recipe
from hopskip.train.run import run

RECIPE = RECIPES / "gsm8k-finetune.yaml"
VARIANTS = {"with-recipe": [], "without-recipe": ["layerskip={p_max: 0, e_scale: 0}"]}
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--where", metavar="FIELD=VALUE", help="only rows with this value")
    parser.add_argument("--output", type=Path, default=Path("runs/gsm8k"))
    parser.add_argument("--num-problems", type=int, default=500, help="held-out problems to answer")
    parser.add_argument("--num-prompts", type=int, default=20, help="prompts to measure speed on")
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"overrides": arguments.overrides}
    for name, own in VARIANTS.items():
        overrides = [f"data.train={arguments.data}", f"output={arguments.output / name}", *own, *arguments.overrides]
        if arguments.where:
            field, _, value = arguments.where.partition("=")
            overrides.append(f"data.where={{{field}: {value}}}")
        recipe = load_recipe(RECIPE, overrides)
        model = Path(recipe.output) / "model"
        if not model.exists():
            print(f"training: {name}", file=sys.stderr)
            run(recipe)
        print(f"measuring: {name}", file=sys.stderr)
        trained_exit = None
        if recipe.layerskip.e_scale > 0:
            problems = itertools.islice(read_split(recipe.data, held_out=False), 256)
            texts = [problem[recipe.data.prompt_field] for problem in problems]
            exits = recipe.layerskip.exits or (2, 4, 6, 8)
            trained_exit = plain_exit(model, texts, exits, 2048, arguments.output / name / "exit", arguments.threads)
        prompts = load_prompts("gsm8k", arguments.num_prompts)
        report[name] = {
            **accuracy(model, recipe, arguments.num_problems, arguments.threads),
            **speed(model, trained_exit, prompts, arguments.threads),
        }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


def accuracy(model: Path, recipe: Recipe, num_problems: int, threads: int) -> dict[str, Any]:
    """Share of held-out problems whose answer ends in the right number, with its standard error."""
    data = recipe.data
    problems = list(itertools.islice(read_split(data, held_out=True), num_problems))
    llm = LLM(model, speculative=SpeculativeConfig(draft="none"), threads=threads, max_num_seqs=16)
    chats = [[{"role": "user", "content": problem[data.prompt_field]}] for problem in problems]
    results = llm.generate(chats, SamplingParams(max_new_tokens=256))
    right = sum(
        final_number(result.text) == final_number(problem[data.response_field]) is not None
        for result, problem in zip(results, problems, strict=True)
    )
    share = right / len(problems)
    return {
        "num_problems": len(problems),
        "accuracy": share,
        "standard_error": math.sqrt(share * (1 - share) / len(problems)),
    }


def final_number(text: str) -> float | None:
    """The last number of an answer.

    >>> final_number("5*3 = 15 dollars. The answer is 1,215.")
    1215.0
    """
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def plain_exit(
    model: Path, prompts: Sequence[str], exits: Sequence[int], vocabulary: int, folder: Path, threads: int
) -> Path:
    """The fastest of the model's plain `exits`, over the `vocabulary` tokens that it answers `prompts` with most: the
    folder of a trained exit without layers of its own. Nothing is trained for it here."""
    if (folder / "exit").exists():
        return folder / "exit"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "given.jsonl").write_text("".join(lines), encoding="utf-8")
    return train_exit(
        ExitRecipe(
            output=str(folder),
            base=str(model),
            prompts=PromptsRecipe(files=(str(folder / "given.jsonl"),)),
            branches=tuple(Branch(start=exit, num_layers=0) for exit in exits),
            vocabulary=vocabulary,
            held_out_every=16,
            search=SearchRecipe(least_speedup=0.0),  # the comparison below says what it is worth
            threads=threads,
        ),
        report=lambda line: print(line, file=sys.stderr),
    )


def speed(model: Path | None, trained_exit: Path | None, prompts: Sequence[Prompt], threads: int) -> dict[str, Any]:
    """Greedy decoding in bfloat16, plain, by lookup, from the exit, and as `auto` chooses among the two: in turn, the
    median of three each. Without a `model` it is the default one, with the exit that comes with it."""
    settings = {"plain": SpeculativeConfig(draft="none"), "lookup": SpeculativeConfig(draft="ngram")}
    if trained_exit is not None or model is None:
        settings["exit"] = SpeculativeConfig(draft="exit-branch", exit_branch=trained_exit)
        settings["auto"] = SpeculativeConfig(draft="auto", exit_branch=trained_exit)
    described = {}
    if trained_exit is not None:
        found = TrainedExit.load(trained_exit)
        described = {
            "exit_layer": found.config.start,
            "num_draft_tokens": found.num_draft_tokens,
            "num_runner_ups": found.num_runner_ups,
        }
    engines = {
        name: LLM(model, speculative=s, dtype="bfloat16", threads=threads, max_num_seqs=1)
        for name, s in settings.items()
    }
    # as the model was trained: through its chat template
    encoded = [prompt.encode(engines["plain"].tokenizer) for prompt in prompts]
    return {**described, **decode_in_turn(engines, encoded, SamplingParams(max_new_tokens=128), repeats=3)}


if __name__ == "__main__":
    main()
