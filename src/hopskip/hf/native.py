"""The native engine behind `generate`: the weights of a model in memory are packed once, and the engine's own loop
generates. Logits processors become its parameters; stopping criteria are asked after each token."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput

from hopskip.backends.base import Backend
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.safetensors import PLAIN_TYPES, some
from hopskip.checkpoint.stored import StoredTensor
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.engine.engine import Engine, make_engine
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig, load_backend
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WHERE = Path("the model in memory")
_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", "past_key_values")
_PRECISIONS = ("auto", "float32", "bfloat16", "q8", "q4")
_COUNTS = ("num_target_passes", "num_drafts", "num_draft_tokens", "num_accepted_tokens")


@dataclass(frozen=True)
class _Held(StoredTensor):
    """A tensor in memory, in place of one in a file."""

    memory: NDArray[np.uint8]

    def blocks(self, first: int = 0, count: int | None = None) -> NDArray[np.uint8]:
        stop = self.num_rows if count is None else first + count
        return self.memory[first:stop]


def in_memory(model: Any) -> Checkpoint:
    """A transformers model as a checkpoint. Weights on the CPU are shared, not copied.

    Raises:
        CheckpointError: hopskip does not run its architecture.
        ConfigError: its weights are not those of the plain architecture.
    """
    config = ModelConfig.from_hf(model.config.to_dict(), model.generation_config.to_dict())
    state, expected = model.state_dict(), expected_tensors(config)
    wrong = [
        name
        for name, shape in expected.items()
        if name not in state or tuple(state[name].shape) != shape or state[name].dtype not in _TYPES
    ]
    if wrong:
        raise ConfigError(
            f"engine 'native' cannot pack this model: {some(wrong)} are not plain weights; merge adapters, load it "
            "without quantization, or use engine 'torch'"
        )
    return Checkpoint(_WHERE, config, {name: _held(state[name], shape) for name, shape in expected.items()}, "")


def _held(tensor: Tensor, shape: tuple[int, ...]) -> _Held:
    flat = tensor.detach().cpu().contiguous().reshape(-1, shape[-1])
    return _Held(_WHERE, 0, PLAIN_TYPES[_TYPES[tensor.dtype]], shape, flat.view(torch.uint8).numpy())


_backends: WeakKeyDictionary[Any, tuple[Any, Backend]] = WeakKeyDictionary()
_lock = threading.Lock()
"""Held while a backend is made, and while one steps."""


def backend_of(model: Any, precision: str, trained_exit: TrainedExit | None) -> Backend:
    """The weights of a model, packed anew where they have changed since, or are wanted otherwise.

    Raises:
        ConfigError: this machine or this model cannot be used, or there is no such precision.
    """
    if precision not in _PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(_PRECISIONS)}")
    state = [(tensor.data_ptr(), tensor._version) for tensor in model.state_dict(keep_vars=True).values()]
    known = _backends.get(model)
    if known is None or known[0] != (precision, state) or known[1].trained_exit is not trained_exit:
        _backends.pop(model, None)  # its memory is free before the new one's is taken
        backend = load_backend(in_memory(model), LoadConfig(dtype=precision, backend="native", device="cpu"))  # type: ignore[arg-type]
        if trained_exit is not None:
            backend.attach_exit(trained_exit)
        _backends[model] = known = (precision, state), backend
    return known[1]


def generate_natively(
    model: Any,
    input_ids: Tensor,
    logits_processor: Iterable[Any],
    stopping_criteria: Any,
    config: Any,
    *,
    exit_layer: int | None,
    trained_exit: TrainedExit | None,
    num_draft_tokens: int | None,
    precision: str,
    streamer: Any,
    stats: dict[str, Any] | None,
    inputs: dict[str, Any],
) -> Any:
    """As `hopskip.hf.self_speculative` with `engine="native"`.

    Raises:
        ConfigError: a parameter that the engine does not have.
    """
    _check(config, streamer, input_ids, inputs)
    num_new = int(config.max_length) - input_ids.shape[1]
    params = sampling_params(logits_processor, config, input_ids.shape[1], num_new)
    speculative = SpeculativeConfig(
        draft="early-exit" if exit_layer is not None else "exit-branch" if trained_exit is not None else None,
        exit_layer=exit_layer,
        num_draft_tokens=num_draft_tokens,
    )
    eos = getattr(config, "_eos_token_tensor", None)
    mask = inputs.get("attention_mask")
    requests = []
    for row, ids in enumerate(input_ids.cpu()):
        prompt = ids if mask is None else ids[mask[row].cpu().bool()]
        own = params.updated(seed=int(torch.randint(2**53, ()))) if config.do_sample else params
        requests.append(Request(prompt.tolist(), own, is_stop=_asks(stopping_criteria, ids, num_new)))
    with _lock:
        engine = make_engine(
            backend_of(model, precision, trained_exit),
            speculative,
            eos_token_ids=() if eos is None else eos.tolist(),
            max_num_seqs=len(requests),
        )
        sequences = [engine.add(request) for request in requests]
        _run(engine, sequences, input_ids, streamer)
    if stats is not None:
        stats.update({name: sum(getattr(s.stats, name) for s in sequences) for name in _COUNTS})
        lists = [s.stats.num_accepted_tokens_per_pos for s in sequences]
        longest = max(map(len, lists))
        stats["num_accepted_tokens_per_pos"] = [sum(li[i] for li in lists if i < len(li)) for i in range(longest)]
    return _result(sequences, input_ids, config)


def _check(config: Any, streamer: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
    for name in ("output_scores", "output_logits"):
        if config.return_dict_in_generate and getattr(config, name, None):
            raise ConfigError(f"{name} needs engine 'torch'; leave one out")
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ConfigError("past_key_values needs engine 'torch': the native engine has a cache of its own")
    for name, value in inputs.items():
        if value is not None and name not in _INPUTS:
            raise ConfigError(f"{name} needs engine 'torch'; leave one out")
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(f"a streamer takes one text, but there are {len(input_ids)}; leave one out")


def _asks(criteria: Any, ids: Tensor, num_new: int) -> Callable[[int], bool]:
    """Asks the stopping criteria after each token of one text, padding on the left included."""
    text = torch.cat((ids, ids.new_zeros(num_new)))[None]
    length = len(ids)

    def is_stop(token: int) -> bool:
        nonlocal length
        text[0, length] = token
        length += 1
        return bool(criteria(text[:, :length], None)[0])

    return is_stop


def _run(engine: Engine, sequences: list[Sequence], input_ids: Tensor, streamer: Any) -> None:
    if streamer is not None:
        streamer.put(input_ids.cpu())
    num_told = 0
    while engine.has_work:
        engine.step()
        if streamer is not None:
            for token in sequences[0].tokens[num_told:]:
                streamer.put(torch.tensor([token.id]))
            num_told = len(sequences[0].tokens)
    for sequence in sequences:
        if sequence.error is not None:
            raise sequence.error
    if streamer is not None:
        streamer.end()


def _result(sequences: list[Sequence], input_ids: Tensor, config: Any) -> Any:
    longest = max(len(s.tokens) for s in sequences)
    pad = getattr(config, "_pad_token_tensor", None)
    if pad is None and any(len(s.tokens) < longest for s in sequences):
        raise ConfigError("texts of several lengths need a pad_token_id; give one")
    fill = [] if pad is None else [int(pad)]
    rows = [[token.id for token in s.tokens] + fill * (longest - len(s.tokens)) for s in sequences]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    ids = torch.cat((input_ids, new), dim=1)
    return GenerateDecoderOnlyOutput(sequences=ids) if config.return_dict_in_generate else ids


# -- parameters --------------------------------------------------------------------------------------------------------


def sampling_params(processors: Iterable[Any], config: Any, num_prompt_tokens: int, num_new: int) -> SamplingParams:
    """What the engine is told in place of logits processors.

    Raises:
        ConfigError: it has no parameter for one of them.
    """
    values: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    bias: dict[int, float] = {}
    for processor in processors:
        name = type(processor).__name__
        if name in _FIELDS:
            field, attribute = _FIELDS[name]
            values[field] = getattr(processor, attribute)
        elif name == "MinLengthLogitsProcessor":
            values["min_tokens"] = max(values.get("min_tokens", 0), processor.min_length - num_prompt_tokens)
        elif name == "MinNewTokensLengthLogitsProcessor":
            values["min_tokens"] = max(values.get("min_tokens", 0), processor.min_new_tokens)
        elif name == "SuppressTokensLogitsProcessor":
            bias |= dict.fromkeys(processor.suppress_tokens.tolist(), -math.inf)
        elif name in ("SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor") and _is_of_tokens(processor):
            for (token,), value in processor.sequence_bias.items():
                bias[token] = bias.get(token, 0.0) + value
        elif name != "LogitNormalization":  # which changes no choice
            raise ConfigError(f"engine 'native' has nothing like {name}; leave it out, or use engine 'torch'")
        if getattr(processor, "prompt_ignore_length", None):
            raise ConfigError("engine 'native' has no prompt_ignore_length; leave it out, or use engine 'torch'")
    values["min_tokens"] = min(max(values.get("min_tokens", 0), 0), num_new)
    return SamplingParams(max_new_tokens=num_new, logit_bias=bias, **values)


_FIELDS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
}


def _is_of_tokens(processor: Any) -> bool:
    return all(len(sequence) == 1 for sequence in processor.sequence_bias)
