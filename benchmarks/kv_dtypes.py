"""What keys and values in bfloat16 and int8 cost in quality, against float32 ones beside the same weights.

    python -m benchmarks.kv_dtypes --tokens 4096

The text is the prompts `long`, one after the other, a window of it. KL is the mean divergence of the next token's
distribution, and perplexity is that of the text. Settings share weights, so differences are theirs alone.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from hopskip.backends.native.backend import NativeBackend
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.machine import cpu_name
from hopskip.prompts import load_prompts
from hopskip.text.tokenizer_files import load_tokenizer

AT_ONCE = 256


def log_probs(checkpoint: Checkpoint, precision: str, kv_dtype: str, token_ids: list[int]) -> Tensor:
    """Of the next token after each, float64 [tokens, vocabulary]."""
    backend = NativeBackend.load(checkpoint, precision, kv_dtype=kv_dtype)
    cache, found = backend.new_cache(1, len(token_ids)), []
    for start in range(0, len(token_ids), AT_ONCE):
        ids = token_ids[start : start + AT_ONCE]
        hidden_ND = backend.forward(ids, Rows([Segment(0, start, len(ids))]), cache).hidden_ND
        found.append(torch.log_softmax(torch.from_numpy(backend.logits(hidden_ND)).double(), -1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    path = find_model(arguments.model)
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(path, checkpoint.config)
    token_ids = [i for prompt in load_prompts("long") for i in prompt.encode(tokenizer)][: arguments.tokens]
    print(f"{cpu_name()}, weights in {arguments.precision}, {len(token_ids)} tokens")
    following = torch.tensor(token_ids[1:])[:, None]
    exact = log_probs(checkpoint, arguments.precision, "float32", token_ids)
    for kv_dtype in ("float32", "bfloat16", "int8"):
        own = exact if kv_dtype == "float32" else log_probs(checkpoint, arguments.precision, kv_dtype, token_ids)
        divergence = float((exact.exp() * (exact - own)).sum(-1).mean())
        perplexity = float((-own[:-1].gather(1, following).mean()).exp())
        same = float((own.argmax(-1) == exact.argmax(-1)).double().mean())
        name = kv_dtype
        print(f"{name:9} KL {divergence:.2e}, perplexity {perplexity:.3f}, the same best token {same:.2%}")


if __name__ == "__main__":
    main()
