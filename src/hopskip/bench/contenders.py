"""Who takes part in a benchmark. Each contender loads its own model in a process of its own, and generates for one
prompt at a time: token ids in, token ids and times out."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hopskip.checkpoint.checkpoint import open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.kinds import starts_as_gguf
from hopskip.engine.engine import make_engine
from hopskip.loading import LoadConfig, OpenModel, open_model
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request
from hopskip.speculative import SpeculativeConfig


class AbsentError(Exception):
    """A contender cannot take part on this machine; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One generation. The first pass over the prompt is apart from the rest."""

    token_ids: list[int]
    prefill_seconds: float
    """Until the first token (or the first few, where the prompt's pass already verifies a draft)."""
    decode_seconds: float
    num_decoded: int
    """Tokens generated in `decode_seconds`."""
    tokens_per_pass: float = 1.0
    """Of all full passes, those without a draft to verify among them: what the time depends on."""
    mean_acceptance_length: float = 1.0
    """Of the passes that had a draft, the bonus or recovered token counted; 1 without drafts."""

    @property
    def decode_tokens_per_second(self) -> float:
        return self.num_decoded / self.decode_seconds


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory that plain decoding of one token must read."""

    weight_bytes: int
    kv_bytes_per_position: int

    def bytes_per_token(self, num_positions: float) -> float:
        return self.weight_bytes + self.kv_bytes_per_position * num_positions


class Runner(ABC):
    """A loaded contender."""

    footprint: Footprint

    @abstractmethod
    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        """Greedy; exactly `num_tokens` tokens, whatever ends a text; nothing kept from earlier prompts."""


@dataclass(frozen=True, kw_only=True)
class Contender(ABC):
    """What a contender is, before it is started: sent to its process as it stands."""

    name: str
    plain: str | None = None
    """Name of the contender whose tokens this one must give, because it only speculates on top of it."""
    variant_of: str | None = None
    """Contenders that are one opponent in several precisions share this name; the fastest of them is quoted."""

    @abstractmethod
    def start(self, threads: int, max_model_len: int) -> Runner:
        """Load the model, to run on `threads` threads and texts of at most `max_model_len` tokens.

        Raises:
            AbsentError: it cannot take part here.
        """


# -- hopskip -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Hopskip(Contender):
    """Our engine, as `LLM` with these options makes it: what it measures of the model here is remembered for both."""

    load: LoadConfig
    """Its `threads` are those that the contender is started with."""
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)

    def start(self, threads: int, max_model_len: int) -> Runner:
        return _HopskipRunner(open_model(replace(self.load, threads=threads), self.speculative), self.speculative)


class _HopskipRunner(Runner):
    def __init__(self, opened: OpenModel, speculative: SpeculativeConfig) -> None:
        backend = opened.backend
        self._engine = make_engine(backend, speculative, identity=opened.identity, max_num_seqs=1, prefix_caching=False)
        self.footprint = Footprint(
            weight_bytes=backend.traits.bytes_per_pass,
            kv_bytes_per_position=backend.new_cache(1, 1).bytes_per_position,
        )

    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        sequence = self._engine.add(Request(prompt_ids, params))
        while self._engine.has_work:
            self._engine.step()
        stats = sequence.stats
        return Measurement(
            token_ids=[token.id for token in sequence.tokens],
            prefill_seconds=stats.prefill_seconds,
            decode_seconds=stats.decode_seconds,
            num_decoded=stats.num_tokens - 1,
            tokens_per_pass=(stats.num_tokens - 1) / max(1, stats.num_target_passes),
            mean_acceptance_length=stats.mean_acceptance_length,
        )


# -- transformers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Transformers(Contender):
    """`generate` of transformers; with an exit layer, drafting by its `assistant_early_exit`."""

    path: Path
    dtype: str
    exit_layer: int | None = None
    num_draft_tokens: int | None = None

    def start(self, threads: int, max_model_len: int) -> Runner:
        try:
            import torch

            from hopskip.checkpoint.in_transformers import load_in_transformers
        except ImportError:
            raise AbsentError("transformers is not installed: pip install 'hopskip[eval]'") from None
        torch.set_num_threads(threads)
        config = open_checkpoint(self.path).config
        return _TransformersRunner(load_in_transformers(self.path, getattr(torch, self.dtype)), config, self)


class _TransformersRunner(Runner):
    def __init__(self, model: Any, config: ModelConfig, what: Transformers) -> None:
        settings = model.generation_config
        settings.eos_token_id = None  # every contender generates the same number of tokens
        settings.pad_token_id = 0
        self._extra: dict[str, Any] = {}
        if what.exit_layer is not None:
            # given to `generate` these would be ignored: it reads the assistant's own settings, which are the model's
            settings.num_assistant_tokens = what.num_draft_tokens
            settings.num_assistant_tokens_schedule = "constant"
            settings.assistant_confidence_threshold = 0.0
            self._extra["assistant_early_exit"] = what.exit_layer
        self._model = model
        embeddings = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        self.footprint = Footprint(
            weight_bytes=sum(parameter.nbytes for parameter in model.parameters()) - embeddings,
            kv_bytes_per_position=_kv_numbers(config) * (4 if what.dtype == "float32" else 2),
        )

    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        import torch

        clock = _StreamClock()
        ids = torch.tensor([prompt_ids])
        started = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            streamer=clock,
            **self._extra,
        )
        token_ids = out[0, len(prompt_ids) :].tolist()
        return _from_arrivals(token_ids, started, clock.arrivals[1:], num_tokens)  # the prompt itself comes first


class _StreamClock:
    """A streamer that notes when how many tokens came."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []

    def put(self, tokens: Any) -> None:
        self.arrivals.append((time.perf_counter(), tokens.numel()))

    def end(self) -> None:
        pass


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LlamaCpp(Contender):
    """llama.cpp through its Python binding; with `num_lookup_tokens`, drafting by its prompt lookup."""

    path: Path
    num_lookup_tokens: int | None = None

    def start(self, threads: int, max_model_len: int) -> Runner:
        try:
            import llama_cpp
        except ImportError:
            raise AbsentError("llama-cpp-python is not installed") from None
        if not (self.path.is_file() and starts_as_gguf(self.path)):
            raise AbsentError("llama.cpp reads GGUF files only; give one with --llama-cpp-model")
        draft_model = None
        if self.num_lookup_tokens is not None:
            from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

            draft_model = LlamaPromptLookupDecoding(max_ngram_size=4, num_pred_tokens=self.num_lookup_tokens)
        llama = llama_cpp.Llama(
            str(self.path),
            n_ctx=max_model_len,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=draft_model,
            verbose=False,
        )
        return _LlamaCppRunner(llama, self.path, draft_model is not None)


class _LlamaCppRunner(Runner):
    def __init__(self, llama: Any, path: Path, drafts: bool) -> None:
        self._llama = llama
        self._drafts = drafts
        self.footprint = Footprint(
            weight_bytes=gguf_bytes_per_token(path),
            kv_bytes_per_position=_kv_numbers(open_checkpoint(path).config) * 2,  # float16,
        )

    def generate(self, prompt_ids: list[int], num_tokens: int) -> Measurement:
        self._llama.reset()
        started = time.perf_counter()
        token_ids: list[int] = []
        arrivals: list[tuple[float, int]] = []
        for token in self._with_drafts(prompt_ids) if self._drafts else self._plain(prompt_ids):
            token_ids.append(token)
            arrivals.append((time.perf_counter(), 1))
            if len(token_ids) == num_tokens:
                break
        return _from_arrivals(token_ids, started, arrivals, num_tokens)

    def _with_drafts(self, prompt_ids: list[int]) -> Any:
        return self._llama.generate(prompt_ids, temp=0.0)

    def _plain(self, prompt_ids: list[int]) -> Any:
        """The binding's own `generate` without its sampler chain, which greedy decoding does not need: a bit faster."""
        import llama_cpp
        import numpy as np

        tokens = prompt_ids
        while True:
            self._llama.eval(tokens)
            logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
            tokens = [int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())]
            yield tokens[0]


def gguf_bytes_per_token(path: Path) -> int:
    """Bytes of a GGUF file's tensors that one token needs: all but an embedding table that is not the head as well."""
    from gguf import GGUFReader

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    embeddings = sizes["token_embd.weight"] if "output.weight" in sizes else 0
    return sum(sizes.values()) - embeddings


# -- common ------------------------------------------------------------------------------------------------------------


def _kv_numbers(config: ModelConfig) -> int:
    """Numbers in keys and values of one position."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _from_arrivals(
    token_ids: list[int], started: float, arrivals: Seq[tuple[float, int]], num_tokens: int
) -> Measurement:
    """Times from when tokens came: what came first belongs to the prompt's pass."""
    if len(token_ids) != num_tokens:
        raise RuntimeError(f"{len(token_ids)} tokens were generated, not {num_tokens}")
    first, num_first = arrivals[0]
    # the others draft in every round, so that both means are the same
    tokens_per_pass = sum(count for _, count in arrivals) / len(arrivals)
    return Measurement(
        token_ids=token_ids,
        prefill_seconds=first - started,
        decode_seconds=arrivals[-1][0] - first,
        num_decoded=num_tokens - num_first,
        tokens_per_pass=tokens_per_pass,
        mean_acceptance_length=tokens_per_pass,
    )
