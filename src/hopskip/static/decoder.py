"""Greedy decoding of token ids through static rounds: prompts in, rounds queued ahead, reports read late.

Shape letters: B sequences, R rows of each in a verify pass, N rows, D hidden size, A taps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from typing import Literal, get_args

import torch

from hopskip.branch import Mixing
from hopskip.cache import Rows, Segment
from hopskip.draft.config import SpeculativeConfig
from hopskip.errors import ConfigError, PromptError
from hopskip.model import Transformer
from hopskip.static.capture import capture
from hopskip.static.kernels import Kernels, TorchKernels
from hopskip.static.matrix import Matrix, Precision
from hopskip.static.model import Layer, StaticModel, pack_layers
from hopskip.static.round import BranchExit, EarlyExit, Round, State, StaticDraft
from hopskip.stats import SpeculativeStats

KernelKind = Literal["auto", "triton", "torch"]
_PREFILL_ROWS = 512
_ROUNDS_AHEAD = 1
"""Rounds that are queued on a GPU beyond the one whose report is read. A round that comes after the end of all texts
changes nothing, so it costs its time only."""


@dataclass
class Generated:
    """What one prompt gave. A stop token is the last of `token_ids`."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None
    stats: SpeculativeStats = field(default_factory=SpeculativeStats)


class StaticDecoder:
    """Decodes greedily at static shapes, on CUDA with one graph per round.

    Prompts are read by `model` itself; from the first generated token on everything runs through the kernels of this
    package, with weights packed to `precision`. The text is that of plain decoding by the same class (draft "none") in
    the same precision: with Triton's kernels to the last bit, with PyTorch's at the same `num_rows`.

    Args:
        model: on any device; a trained exit is attached to it beforehand.
        speculative: draft "early-exit", "exit-branch" or "none", verified by recomputing.
        batch_size: sequences that are decoded together.
        max_model_len: longest sequence, prompt and output; None for the model's own context.
        stop_token_ids: end a text. None: the model's EOS ids.
        precision: of the weights that the verify pass reads; None: the model's own tensors, not copied.
        draft_precision: of the draft's layers and head; None: as `precision`.
        kernels: "auto" takes Triton's on CUDA and PyTorch's elsewhere; or kernels with tilings of their own.
        num_rows: rows of each sequence in a verify pass; None: one more than draft tokens.
        compile: put rounds through `torch.compile`, which fuses what PyTorch's kernels leave apart. Takes minutes.

    Raises:
        ConfigError: an option cannot work with this model or device, or would have no effect.
    """

    def __init__(
        self,
        model: Transformer,
        speculative: SpeculativeConfig | None = None,
        *,
        batch_size: int = 1,
        max_model_len: int | None = None,
        stop_token_ids: Seq[int] | None = None,
        precision: Precision | None = None,
        draft_precision: Precision | None = None,
        kernels: KernelKind | Kernels = "auto",
        num_rows: int | None = None,
        compile: bool = False,
    ) -> None:
        context = model.config.max_position_embeddings
        if max_model_len is not None and not 1 < max_model_len <= context:
            raise ConfigError(f"max_model_len is {max_model_len}; the model's context allows 2 to {context}")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        self.model = model
        self.max_model_len = max_model_len or context
        self.batch_size = batch_size
        self.speculative = _resolve(speculative, model)
        num_draft_tokens = self.speculative.num_draft_tokens or 0
        if num_rows is not None and num_rows <= num_draft_tokens:
            raise ConfigError(
                f"num_rows is {num_rows}; {num_draft_tokens} draft tokens need at least {num_draft_tokens + 1}"
            )
        if draft_precision is not None and not num_draft_tokens:
            raise ConfigError(f"draft_precision={draft_precision} has no effect with draft 'none'; leave it out")
        self.num_rows = num_rows or num_draft_tokens + 1
        self.kernels = make_kernels(kernels, model)
        # the verify pass of a sequence's last round may reach past its end
        self.static = StaticModel(model, self.kernels, batch_size, self.max_model_len + self.num_rows)
        self.precision = precision
        self.layers = pack_layers(model.weights.layers, precision)
        self.head = Matrix.pack(model.weights.lm_head, precision)
        self.draft = self._make_draft(draft_precision or precision)
        stop_ids = model.config.eos_token_ids if stop_token_ids is None else tuple(stop_token_ids)
        self._stop_ids = frozenset(stop_ids)
        self.round = Round(
            self.static,
            self.layers,
            self.head,
            self.draft,
            num_draft_tokens=num_draft_tokens,
            num_rows=self.num_rows,
            stop_ids=torch.tensor(stop_ids, dtype=torch.int64, device=model.device),
        )
        self.state = State.empty(batch_size, self.num_rows, model.device)
        self._compile = compile
        self._run_round: Callable[[], object] | None = None

    @torch.inference_mode()
    def generate(self, prompts: Seq[Seq[int]], max_new_tokens: int = 256) -> list[Generated]:
        """Continue each prompt, `batch_size` at a time. Results come in the order of the prompts.

        Raises:
            ConfigError: `max_new_tokens` is below 1.
            PromptError: a prompt is empty, holds an unknown id, or does not fit with `max_new_tokens`.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        for prompt in prompts:
            self._check(prompt, max_new_tokens)
        if self._run_round is None:
            run = torch.compile(self.round, fullgraph=True) if self._compile else self.round
            self._run_round = capture(lambda: run(self.state), self.model.device)
        results: list[Generated] = []
        for first in range(0, len(prompts), self.batch_size):
            results += self._generate(prompts[first : first + self.batch_size], max_new_tokens)
        return results

    def _check(self, prompt: Seq[int], max_new_tokens: int) -> None:
        vocab_size = self.model.config.vocab_size
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        unknown = next((i for i in prompt if not 0 <= i < vocab_size), None)
        if unknown is not None:
            raise PromptError(f"prompt has token id {unknown}; the model's ids are 0 to {vocab_size - 1}")
        if len(prompt) + max_new_tokens > self.max_model_len:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and max_new_tokens is {max_new_tokens}: "
                f"more than max_model_len, {self.max_model_len}; lower one or raise the other"
            )

    def _make_draft(self, precision: Precision | None) -> StaticDraft | None:
        """`precision` as resolved; where it is the target's own, the packed weights are shared."""
        model, weights, config = self.model, self.model.weights, self.model.config
        if self.speculative.draft == "none":
            return None

        def first_layers(stop: int) -> list[Layer]:
            shares = precision == self.precision
            return self.layers[:stop] if shares else pack_layers(weights.layers[:stop], precision)

        if self.speculative.draft == "early-exit":
            assert self.speculative.exit_layer is not None
            head = self.head if precision == self.precision else Matrix.pack(weights.lm_head, precision)
            return EarlyExit(first_layers(self.speculative.exit_layer), head)
        branch = model.branch
        assert branch is not None
        return BranchExit(
            branch,
            layers=pack_layers(model.layers[config.num_hidden_layers :], precision),
            first=first_layers(branch.config.start),
            head=Matrix.pack(weights.lm_head[branch.vocabulary.to(model.device)], precision),
            mixing=Mixing(branch, config.rms_norm_eps, model.dtype, model.device),
            batch_size=self.batch_size,
            num_rows=self.num_rows,
            like=weights.norm,
        )

    # -- prompts -------------------------------------------------------------------------------------------------------

    def _begin(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Generated]:
        """Read the prompts, and set the state to what follows; slots without a prompt stand still."""
        results: list[Generated] = []
        last, position, limit = ([0] * self.batch_size for _ in range(3))
        for slot, prompt in enumerate(prompts):
            started = time.perf_counter()
            last[slot] = self._prefill(slot, prompt)
            seconds = time.perf_counter() - started
            stats = SpeculativeStats(num_prompt_tokens=len(prompt), prefill_seconds=seconds)
            results.append(Generated(stats=stats))
            self._append(results[-1], last[slot], max_new_tokens)
            position[slot] = len(prompt)
            limit[slot] = len(prompt) + (0 if results[-1].finish_reason else max_new_tokens - 1)
        for tensor, values in zip(
            (self.state.last_B, self.state.position_B, self.state.limit_B), (last, position, limit), strict=True
        ):
            tensor.copy_(torch.tensor(values))
        # a branch begins at the tokens that the last verify pass chose
        self.state.report_BC.zero_()
        self.state.report_BC[:, 2] = self.state.last_B
        return results

    def _prefill(self, slot: int, prompt: Seq[int]) -> int:
        """Read one prompt in pieces, by the model's own layers. Returns the token that follows."""
        model, cache, depth = self.model, self.static.cache, self.model.config.num_hidden_layers
        branch = self.draft if isinstance(self.draft, BranchExit) else None
        taps = branch.taps if branch is not None else ()
        before = [torch.zeros_like(model.weights.norm)[None] for _ in taps]  # there is no token before the first
        h_ND = model.weights.norm[None]
        for start in range(0, len(prompt), _PREFILL_ROWS):
            ids_N = torch.tensor(prompt[start : start + _PREFILL_ROWS])
            rows = Rows([Segment(slot, start, len(ids_N))])
            h_ND = x_ND = model.embed(ids_N)
            states = []
            for first, stop in pairwise((0, *taps, depth)):
                h_ND = model.run_layers(h_ND, first, stop, rows, cache)
                states.append(h_ND)
            if branch is not None and branch.has_layers:
                shifted = [torch.cat((old, new[:-1])) for old, new in zip(before, states, strict=False)]
                x_ND = branch.enter(x_ND, states, shifted)
                model.run_layers(x_ND, depth, len(model.layers), rows, cache)
            before = [states[i][-1:] for i in range(len(taps))]
        if branch is not None:
            branch.begin(slot, [state_1D[0] for state_1D in before])
        return int(model.greedy(h_ND[-1:]))

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _generate(self, prompts: Seq[Seq[int]], max_new_tokens: int) -> list[Generated]:
        results = self._begin(prompts, max_new_tokens)
        started = time.perf_counter()
        if any(result.finish_reason is None for result in results):
            for report in self._reports():
                for result, row in zip(results, report, strict=False):
                    if result.finish_reason is None:
                        self._commit(result, row, max_new_tokens)
                        result.stats.decode_seconds = time.perf_counter() - started
                if all(result.finish_reason is not None for result in results):
                    break
        for result in results:
            result.stats.num_tokens = len(result.token_ids)
        return results

    def _reports(self) -> Iterator[list[list[int]]]:
        """Run rounds, and yield what each did; on CUDA further rounds are queued before a report is waited for."""
        assert self._run_round is not None
        report_BC = self.state.report_BC
        if self.model.device.type != "cuda":
            while True:
                self._run_round()
                yield report_BC.tolist()
        depth = _ROUNDS_AHEAD + 1
        ring = torch.empty((depth, *report_BC.shape), dtype=report_BC.dtype, pin_memory=True)
        arrived = [torch.cuda.Event() for _ in range(depth)]  # type: ignore[no-untyped-call]
        for index in count():
            # the copy comes after its round and before the next on the device's queue
            self._run_round()
            ring[index % depth].copy_(report_BC, non_blocking=True)
            arrived[index % depth].record()
            if index >= _ROUNDS_AHEAD:
                oldest = (index - _ROUNDS_AHEAD) % depth
                arrived[oldest].synchronize()
                yield ring[oldest].tolist()

    def _commit(self, result: Generated, report: Seq[int], max_new_tokens: int) -> None:
        """Take over one sequence's part of a report."""
        num_committed, num_accepted, *tokens = report
        for token in tokens[:num_committed]:
            self._append(result, token, max_new_tokens)
        result.stats.num_target_passes += 1
        if self.speculative.num_draft_tokens:
            depth = self.speculative.num_draft_tokens
            result.stats.record_draft(depth, min(num_accepted, num_committed), depth)

    def _append(self, result: Generated, token: int, max_new_tokens: int) -> None:
        result.token_ids.append(token)
        if token in self._stop_ids:
            result.finish_reason = "stop"
        elif len(result.token_ids) == max_new_tokens:
            result.finish_reason = "length"


def make_kernels(kind: KernelKind | Kernels, model: Transformer) -> Kernels:
    """Raises ConfigError if they cannot run where the model is."""
    if not isinstance(kind, str):
        return kind
    if kind not in get_args(KernelKind):
        raise ConfigError(f"kernels is {kind!r}; choose one of {', '.join(get_args(KernelKind))}")
    if kind == "torch" or (kind == "auto" and model.device.type != "cuda"):
        return TorchKernels(model.config)
    if model.device.type != "cuda":
        raise ConfigError(f"kernels 'triton' run on CUDA, and this model is on {model.device}; use 'torch'")
    try:
        from hopskip.static.triton_kernels import TritonKernels
    except ImportError as error:
        raise ConfigError(f"Triton cannot be imported ({error}); install it, or use kernels 'torch'") from None
    return TritonKernels(model.config)


def _resolve(speculative: SpeculativeConfig | None, model: Transformer) -> SpeculativeConfig:
    asked = speculative or SpeculativeConfig()
    if asked.draft is None and model.branch is not None and asked.may_use_branch:
        asked = replace(asked, draft="exit-branch")  # the default elsewhere looks up as well
    resolved = asked.resolve(model.config, model.branch)
    if resolved.draft not in ("early-exit", "exit-branch", "none"):
        raise ConfigError(
            f"draft {resolved.draft!r} looks at the text on the host, which static rounds never do; "
            "use draft 'early-exit', 'exit-branch' or 'none'"
        )
    if resolved.draft_precision is not None:
        raise ConfigError(
            f"draft_precision={resolved.draft_precision} is for the native CPU backend, which has no static rounds; "
            "leave it out"
        )
    if resolved.verify == "reuse":
        raise ConfigError(
            "verify 'reuse' is not for static rounds, whose verify pass has one fixed shape; leave it out"
        )
    if speculative is not None and speculative.num_runner_ups:
        raise ConfigError(
            f"num_runner_ups={speculative.num_runner_ups} makes drafts trees, but those of static rounds are chains; "
            "leave it out"
        )
    if resolved.min_confidence > 0:
        raise ConfigError(
            f"min_confidence={resolved.min_confidence} would end drafts early, but the drafts of static rounds have "
            "one length; leave it out"
        )
    return resolved
