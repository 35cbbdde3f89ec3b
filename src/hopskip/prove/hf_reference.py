"""Proof that the same model in transformers gives the same tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch

from hopskip.prove.greedy import TIE_GAP
from hopskip.prove.proof import Proof, Tie

CLAIM = "greedy ids equal transformers', but for ties listed"


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
