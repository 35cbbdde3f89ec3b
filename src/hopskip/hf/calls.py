"""What is given to `generate`: drafts by early layers, by a trained exit, or the whole loop on the native engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.errors import ConfigError, check_choice
from hopskip.hf import loop
from hopskip.hf.model import check_exit_layer, check_inputs, check_num_draft_tokens
from hopskip.hf.native import generate_natively
from hopskip.hf.texts import Texts
from hopskip.hf.trained import ExitBranch, load_exit

Engine = Literal["torch", "native"]


def self_speculative(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    exit_layer: int | None = None,
    exit_branch: str | Path | TrainedExit | None = None,
    num_draft_tokens: int | None = None,
    engine: Engine = "torch",
    precision: str | None = None,
    token_streamer: Any = None,
    draft_stats: dict[str, Any] | None = None,
    **inputs: Any,
) -> Any:
    """For `model.generate(..., custom_generate=hopskip.hf.self_speculative)`. The text is that of plain `generate`:
    greedy, or drawn with the same seed of PyTorch. One call after the other, or several at once, may use one model.

    Args:
        exit_layer: the model's first layers that draft, 1 to L - 1; None: what the checkpoint recommends.
        exit_branch: a trained exit that drafts instead, or its folder.
        num_draft_tokens: most tokens of a draft; None: as the checkpoint or the exit recommends, else 4.
        engine: `torch` runs the model as it is. `native` packs its weights once and generates on the C++ engine for
            CPUs, whose texts are its own: drawn ones have another noise, and in less than float32 it rounds otherwise.
        precision: of the native engine: `auto` (None) keeps the model's own; float32, bfloat16, q8, q4.
        token_streamer: as `streamer` of `generate`, which does not reach a callable.
        draft_stats: a dict that is given counts, named as those of `SpeculativeStats`.

    Raises:
        ConfigError, ValueError: a parameter cannot work here.
        CheckpointError: the trained exit cannot be read.
    """
    check_choice("engine", engine, Engine)
    if exit_layer is not None and exit_branch is not None:
        raise ConfigError(f"exit_branch={exit_branch} and exit_layer={exit_layer} are two exits; leave one out")
    check_inputs(model, generation_config, inputs)
    if exit_layer is not None:
        check_exit_layer(model, exit_layer)
    trained = None if exit_branch is None else load_exit(model, exit_branch)
    if num_draft_tokens is None and trained is not None:
        num_draft_tokens = trained.num_draft_tokens
    if engine == "native":
        return generate_natively(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            exit_layer=exit_layer,
            trained_exit=trained,
            num_draft_tokens=None if num_draft_tokens is None else check_num_draft_tokens(model, num_draft_tokens),
            precision=precision or "auto",
            streamer=token_streamer,
            stats=draft_stats,
            inputs=inputs,
        )
    if precision is not None:
        raise ConfigError(f"precision={precision} has no effect with engine 'torch', which runs the model as it is")
    number = check_num_draft_tokens(model, num_draft_tokens)
    drafter: loop.Drafter
    if trained is not None:
        drafter = ExitBranch(model, trained)
    else:
        drafter = loop.EarlyExit(model, check_exit_layer(model, exit_layer))
    texts = Texts(input_ids, logits_processor, stopping_criteria, generation_config, inputs)
    return loop.decode(texts, drafter, number, token_streamer, draft_stats)


def generate(model: Any, *positional: Any, **arguments: Any) -> Any:
    """`model.generate` with the same arguments, and those of `self_speculative`: also with `streamer` and
    `stop_strings`, which do not reach a callable.

    Raises:
        As `self_speculative`.
    """
    return loop.generate(*positional, model=model, custom_generate=self_speculative, **arguments)
