"""The paper's recipe by LoRA on hopskip's default model, beside the exit that was trained for the frozen model.

    python -m benchmarks.lora --prompts FILE.jsonl [--output runs/lora] [SECTION.KEY=VALUE ...]

The model answers prompts, half of them from FILE (`prompt` a line) and half written by itself, and LoRA by
the recipe smollm2-135m-lora (overrides go there) teaches its early layers to say what its last layer says. Then both
decode the prompts that come with hopskip, and their last layers read the same text. Prints one JSON object. Run again
after an interruption: it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from benchmarks.gsm8k import plain_exit, speed
from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.bench.perplexity import cut_windows, difference, negative_log_likelihoods, perplexity
from hopskip.machine import num_usable_cores, replacing_file
from hopskip.prompts import load_prompts, whole_prompts
from hopskip.train.exit.prompts import self_prompts
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.recipe import RECIPES, load_recipe, read_recipe
from hopskip.train.run import run

RECIPE = RECIPES / "smollm2-135m-lora.yaml"
SETS = ("alpaca", "gsm8k", "humaneval", "mt_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, default=Path("runs/lora"))
    parser.add_argument(
        "--num-answers",
        type=int,
        default=1000,
        help="prompts to have answered, to train on; those that the model writes twice or does not finish are left out",
    )
    parser.add_argument("--num-prompts", type=int, default=3, help="of each set, to measure speed on")
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    chats = arguments.output / "chats.jsonl"
    if not chats.exists():
        answer(arguments.prompts, chats, arguments.num_answers, arguments.threads)
    recipe = load_recipe(RECIPE, [f"data.train={chats}", f"output={arguments.output / 'run'}", *arguments.overrides])
    model = Path(recipe.output) / "model"
    if not model.exists():
        run(recipe)
    rows = [json.loads(line)["prompt"] for line in chats.read_text(encoding="utf-8").splitlines()[:256]]
    exits = recipe.layerskip.exits or (2, 4, 6, 8)
    lora_exit = plain_exit(model, rows, exits, 8192, arguments.output / "exit", arguments.threads)
    report: dict[str, Any] = {"overrides": arguments.overrides, "last_layer": damage(model, arguments.threads)}
    for prompt_set in SETS:
        print(f"measuring: {prompt_set}", file=sys.stderr)
        prompts = load_prompts(prompt_set, arguments.num_prompts)
        report[prompt_set] = {
            "frozen": speed(None, None, prompts, arguments.threads),
            "lora": speed(model, lora_exit, prompts, arguments.threads),
        }
    for name in ("frozen", "lora"):
        report[f"{name}_exit_mean"] = {
            figure: statistics.mean(report[prompt_set][name][figure]["exit"] for prompt_set in SETS)
            for figure in ("mean_acceptance_length", "speedup")
        }
    (arguments.output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


def answer(prompts: Path, chats: Path, number: int, threads: int) -> None:
    """Write the default model's greedy answers to `chats`; prompts that are measured with are left out."""
    llm = LLM(speculative=SpeculativeConfig(draft="none"), threads=threads, max_num_seqs=64)
    measured = {str(prompt.content).strip() for name in SETS for prompt in load_prompts(name)}
    own = read_recipe(ExitRecipe, RECIPES / "smollm2-135m-exit.yaml").prompts.openings
    given = [prompt.content for prompt in load_prompts(str(prompts))]
    texts = [str(text) for text in random.Random(0).sample(given, min(len(given), number // 2))]
    print(f"the model writes {number - len(texts)} prompts", file=sys.stderr)
    texts += self_prompts(llm.tokenizer, llm.engine, number - len(texts), openings=own)
    texts = [text for text in dict.fromkeys(texts) if text.strip() not in measured and len(text) <= 1000]
    random.Random(0).shuffle(texts)
    print(f"the model answers {len(texts)} prompts", file=sys.stderr)
    results = llm.generate([[{"role": "user", "content": text}] for text in texts], SamplingParams(max_new_tokens=192))
    rows = ({"prompt": text, "response": result.text} for text, result in zip(texts, results, strict=True))
    with replacing_file(chats) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["response"].strip()), encoding="utf-8")


def damage(trained: Path, threads: int) -> dict[str, float]:
    """Perplexity of the default model's last layer and of the trained one's, on the text of `hopskip perplexity`."""
    found = []
    for model in (None, trained):
        llm = LLM(model, speculative=SpeculativeConfig(draft="none"), dtype="float32", threads=threads)
        windows = cut_windows(llm.tokenizer, whole_prompts(), max_tokens=8000)
        depth = llm.backend.config.num_hidden_layers
        found.append(negative_log_likelihoods(llm.backend, windows, [depth])[depth])
    gap = difference(found[1], found[0])
    return {
        "perplexity_before": perplexity(found[0]),
        "perplexity_after": perplexity(found[1]),
        "standard_error_of_the_difference": gap.error,
    }


if __name__ == "__main__":
    main()
