"""The same model in transformers: as a reference to hold our tokens against, and as a contender."""

from __future__ import annotations

import io
from collections.abc import Sequence as Seq
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from hopskip.errors import CheckpointError
from hopskip.prompts import Prompt
from hopskip.prove.greedy import TIE_GAP
from hopskip.prove.proof import Proof, Tie

CLAIM = "greedy ids equal transformers', but for ties listed"


def load_in_transformers(path: Path, dtype: torch.dtype) -> Any:
    """The checkpoint as a transformers model on the CPU; a GGUF file is dequantized by transformers itself."""
    from transformers import AutoModelForCausalLM

    _quieten()
    try:
        with redirect_stderr(io.StringIO()):  # where progress bars go that no setting turns off
            model = AutoModelForCausalLM.from_pretrained(*_place(path)[0], dtype=dtype, **_place(path)[1])
    except Exception as error:  # of many kinds, by file format and architecture
        raise CheckpointError(f"transformers cannot load {path} ({_first_line(error)})") from error
    return model.eval()


def load_tokenizer_in_transformers(path: Path) -> Any:
    from transformers import AutoTokenizer

    _quieten()
    try:
        return AutoTokenizer.from_pretrained(*_place(path)[0], **_place(path)[1])
    except Exception as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of {path} ({_first_line(error)})") from error


def encode_in_transformers(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt as a user of transformers would make them."""
    if isinstance(prompt.content, str) and not tokenizer.chat_template:
        return list(tokenizer(prompt.content)["input_ids"])
    content = prompt.content
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def tokenizer_proof(prompts: Seq[Seq[int]], theirs: Seq[Seq[int]]) -> Proof:
    differing = [index for index, (a, b) in enumerate(zip(prompts, theirs, strict=True)) if list(a) != list(b)]
    equal = f"{len(prompts) - len(differing)} of {len(prompts)} prompts have the same ids"
    return Proof(
        topic="transformers",
        setting="tokenizer and chat template",
        claim="prompts get the same ids",
        status="failed" if differing else "passed",
        detail=equal + (f"; not prompt {', '.join(map(str, differing[:5]))}" if differing else ""),
        counts={"num_prompts": len(prompts), "num_differing_prompts": len(differing)},
    )


@torch.inference_mode()
def transformers_proof(model: Any, prompts: Seq[Seq[int]], generated: Seq[Seq[int]], setting: str) -> Proof:
    """Whether transformers, fed our own tokens, would have chosen each of them.

    One pass per prompt instead of a generation: if its best token after every prefix of our text is our next token,
    then its greedy text is ours. Where it is not, only a tie of its own two best logits excuses the difference.
    """
    faults: list[str] = []
    ties: list[Tie] = []
    for index, (prompt, ours) in enumerate(zip(prompts, generated, strict=True)):
        ids = torch.tensor([[*prompt, *ours[:-1]]])
        logits_TV = model(input_ids=ids, logits_to_keep=len(ours)).logits[0].float()
        for position, (logits_V, token) in enumerate(zip(logits_TV, ours, strict=True)):
            values, best = logits_V.topk(2)
            if int(best[0]) == token:
                continue
            gap = float(values[0] - values[1])
            if gap > TIE_GAP or int(best[1]) != token:
                faults.append(f"prompt {index}: token {position} is {token}, not {int(best[0])}")
                break
            ties.append(Tie(index, position, int(best[0]), token, gap))
    num_tokens = sum(map(len, generated))
    return Proof(
        topic="transformers",
        setting=setting,
        claim=CLAIM,
        status="failed" if faults else "passed",
        detail=f"{len(faults)} of {len(prompts)} prompts differ: {'; '.join(faults[:3])}"
        if faults
        else f"{num_tokens} tokens of {len(prompts)} prompts equal, {len(ties)} ties",
        counts={"num_prompts": len(prompts), "num_tokens": num_tokens, "num_differing_prompts": len(faults)},
        ties=tuple(ties),
    )


def _place(path: Path) -> tuple[tuple[str], dict[str, Any]]:
    """How `from_pretrained` is told where a checkpoint is: a folder, or a GGUF file in one."""
    if path.is_dir():
        return (str(path),), {"local_files_only": True}
    return (str(path.parent),), {"gguf_file": path.name, "local_files_only": True}


def _quieten() -> None:
    """Its warnings would stand between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
