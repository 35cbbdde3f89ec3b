"""What `hopskip export` writes, in the engines that it is for. Run by `scripts/test-doors export`.

    python scripts/doors/export.py FOLDER PEER=PYTHON...

exports to FOLDER, and gives every PEER (llama-cpp, transformers-oldest, transformers-newest, vllm) its part. One line
for each check; exit code 1 if one failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hopskip import LLM, SamplingParams, SpeculativeConfig
from hopskip.checkpoint.hub import find_model
from hopskip.export import eagle3, early_exit, gguf, merged

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
TEXT = "The quick brown fox, naïve café 你好 12:30\n\n  It's"
PROMPTS = [
    "Name three colours and say why people like them.",
    "Write a haiku about rain.",
    "What is 12 times 13? Explain step by step.",
    "Write a Python function that reverses a list.",
]
FAMILIES = (
    "llama2-mha",
    "llama3-gqa",
    "llama-linear",
    "llama-yarn",
    "llama-head-dim",
    "mistral",
    "qwen2",
    "qwen3-tied",
)
COUNT = 48
_CLOSE = 0.02
"""Of two logits that float32 in another order, or llama.cpp's 16 bits of cached keys and values, may turn round."""

Check = tuple[str, str, bool]
"""What was checked, what was found, whether that is right."""


def ask(python: str, program: str, job: object, **environment: str) -> Any:
    """What a program prints last, in a peer's environment."""
    path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, HERE / program, json.dumps(job)],
        env={**path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{program}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def own_ids(model: Path, prompts: list[list[int]], count: int, **speculative: Any) -> list[list[int]]:
    """Greedy, float32."""
    llm = LLM(model, dtype="float32", speculative=SpeculativeConfig(**(speculative or {"draft": "none"})))
    settings = SamplingParams(max_new_tokens=count, ignore_eos=True)
    return [llm.generate([prompt], settings)[0].token_ids for prompt in prompts]


def llama_cpp(folder: Path, python: str) -> Iterator[Check]:
    """Every family in float32, written from a checkpoint folder; the default model's own blocks, whole and cut."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import write_checkpoint

    jobs, wanted = [], []
    for family in FAMILIES:
        write_checkpoint(folder / family, family, tokenizer=True)
        (file,) = gguf(folder / family, folder / f"{family}-gguf", force=True).glob("*.gguf")
        jobs.append((family, folder / family, file, [5, 9, 200, 31, 7, 64], 24))
    default = find_model()
    whole = early_exit(default, folder / "exit24", exit_layer=24, dtype="float32", force=True)
    (from_folder,) = gguf(whole, folder / "exit24-from-folder", force=True).glob("*.gguf")
    (own,) = gguf(default, folder / "default-gguf", force=True).glob("*.gguf")
    (cut,) = early_exit(default, folder / "exit24-gguf", exit_layer=24, format="gguf", force=True).glob("*.gguf")
    prompt = LLM(default).tokenizer.encode(PROMPTS[0])
    jobs += [
        ("SmolLM2's first 24 layers, float32, from a folder", whole, from_folder, prompt, COUNT),
        ("SmolLM2, its own Q4_1 blocks", default, own, prompt, COUNT),
        ("SmolLM2's first 24 layers, Q4_1", whole, cut, prompt, COUNT),
    ]
    found = ask(
        python,
        "llama_cpp_ids.py",
        [{"model": str(file), "text": TEXT, "ids": ids, "count": count} for _, _, file, ids, count in jobs],
    )
    for (what, source, _, ids, count), one in zip(jobs, found["found"], strict=True):
        wanted = own_ids(source, [ids], count)[0]
        same = next((i for i, (a, b) in enumerate(zip(wanted, one["ids"], strict=True)) if a != b), count)
        tokenizer = LLM(source).tokenizer
        is_quantized = "Q4_1" in what  # llama.cpp rounds activations to 8 bits then
        is_right = same == count or is_quantized or one["gaps"][same] < _CLOSE
        gap = "" if same == count else f"; then a gap of {one['gaps'][same]:.3f}"
        yield f"llama-cpp-python {found['version']}: {what}", f"{same} of {count} ids equal{gap}", is_right
        if tokenizer.encode(TEXT) != one["text_ids"]:
            yield f"{what}: tokens of a text", "differ", False


def transformers(folder: Path, python: str) -> Iterator[Check]:
    """Early exits as assistants, without hopskip."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import write_checkpoint

    default = find_model()
    whole = early_exit(default, folder / "exit24", exit_layer=24, dtype="float32", force=True)
    draft = early_exit(whole, folder / "exit8", exit_layer=8, force=True)
    prompt = LLM(default).tokenizer.encode(PROMPTS[0])
    cases = [("SmolLM2's first 24 layers, 8 draft", whole, draft, prompt)]
    for family in ("llama2-mha", "qwen2"):
        write_checkpoint(folder / family, family, tokenizer=True)
        exit = early_exit(folder / family, folder / f"{family}-exit", exit_layer=2, force=True)
        cases.append((family, folder / family, exit, [5, 9, 200, 31, 7, 64]))
    found = ask(
        python,
        "transformers_ids.py",
        [{"model": str(m), "assistant": str(a), "text": TEXT, "ids": ids, "count": 32} for _, m, a, ids in cases],
    )
    for (what, model, _, ids), one in zip(cases, found["found"], strict=True):
        settings = SamplingParams(max_new_tokens=32)
        own = LLM(model, dtype="float32", speculative=SpeculativeConfig(draft="none")).generate([ids], settings)[0]
        is_same = own.token_ids == one["ids"] == one["drafted"]
        yield f"transformers {found['version']}: {what}", "same ids" if is_same else f"{own.token_ids} {one}", is_same
        if LLM(model).tokenizer.encode(TEXT) != one["text_ids"]:
            yield f"{what}: tokens of a text", "differ", False


def vllm(folder: Path, python: str) -> Iterator[Check]:
    """The whole default model, plain, with its first layers and with its exit as drafters."""
    default = find_model()
    model = merged(default, folder / "whole", dtype="float32", force=True)
    draft = early_exit(default, folder / "first24", exit_layer=24, dtype="float32", force=True)
    drafter = eagle3(default, folder / "drafter", dtype="float32", base=str(model), force=True)
    llm = LLM(default)
    prompts = [llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in PROMPTS]
    cases: dict[str, tuple[Path, Any]] = {
        "plain": (model, None),
        "first 24 layers": (model, {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}),
        "exit as EAGLE-3": (model, {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": 3}),
        "the drafter's folder alone": (drafter, None),
    }
    wanted = own_ids(default, prompts, COUNT)
    library = next(Path(python).parent.parent.rglob("libiomp5.so"), "")
    for what, (place, speculative) in cases.items():
        job = {"model": str(place), "speculative": speculative, "ids": prompts, "count": COUNT}
        found = ask(python, "vllm_ids.py", job, LD_PRELOAD=str(library), KMP_BLOCKTIME="1")
        same = sum(a == b for a, b in zip(wanted, found["ids"], strict=True))
        counts = ", ".join(
            f"{name.removeprefix('vllm:spec_decode_')} {value}" for name, value in found["metrics"].items()
        )
        yield f"vllm {found['version']}: {what}", f"{same} of 4 texts equal; {counts}", same == len(prompts)


PEERS = {"llama-cpp": llama_cpp, "transformers-oldest": transformers, "transformers-newest": transformers, "vllm": vllm}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    are_right = True
    for argument in sys.argv[2:]:
        name, _, python = argument.partition("=")
        for what, found, is_right in PEERS[name](folder, python):
            print(f"{'ok  ' if is_right else 'FAIL'} {what}: {found}", flush=True)
            are_right &= is_right
    raise SystemExit(0 if are_right else 1)


if __name__ == "__main__":
    main()
