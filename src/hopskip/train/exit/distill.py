"""Distillation of a trained exit from the model that it will draft for (`hopskip.checkpoint.trained_exit`).

The exit learns the model's next-token distribution over the draft vocabulary, at every token of the model's own
text, and also from its own outputs: unroll step j sees what draft step j will see, the verified features of j tokens
ago and after them what the exit itself put out (the training-time test of EAGLE-3, arXiv 2503.01840).

Shape letters: B conversations, T tokens, A features, D hidden size, H query heads, K key/value heads, E head dimension,
n draft vocabulary, P positions that are predicted, J unroll steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hopskip.backends.torch.layer import LayerWeights, decoder_layer, rms_norm
from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import Checkpoint, expected_tensors
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import ExitConfig, Mixing, TrainedExit
from hopskip.train.exit.batch import Batch
from hopskip.train.exit.recipe import FitConfig


class ExitTrainer(nn.Module):
    """The trainable half of an exit, with the frozen norm and head rows that it shares with the model.

    Args:
        checkpoint: of the model; its config alone gives weights without values, to count memory by.
        dtype: of the matrix products and attention; weights, norms and losses are float32 in any case.
    """

    head: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        checkpoint: Checkpoint | ModelConfig,
        exit_config: ExitConfig,
        vocabulary: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        load: Callable[..., Tensor]
        if isinstance(checkpoint, ModelConfig):
            config, load = checkpoint, partial(_empty, checkpoint)
        else:
            config, load = checkpoint.config, partial(load_tensor, checkpoint)
        self.config = config
        self.exit_config = exit_config
        self.vocabulary = vocabulary
        self._dtype = dtype
        size, depth = config.hidden_size, config.num_hidden_layers

        # the model's last layers are the nearest thing to what the exit must become
        first = depth - exit_config.num_layers
        for index in range(exit_config.num_layers):
            for name in config.layer_tensors():
                weights = load(f"model.layers.{first + index}.{name}", torch.float32)
                self.register_parameter(_registered(index, name), nn.Parameter(weights))
        if exit_config.features:
            self.fuse = nn.Parameter(torch.zeros(size, len(exit_config.features) * size))
            self.mix = nn.Parameter(torch.zeros(size, 2 * size))
            self.token_norm = nn.Parameter(torch.ones(size))
            self.feature_norm = nn.Parameter(torch.ones(size))
        head = load("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
        cos, sin = config.rope.tables(config.context_length)
        for name, values in {
            "head": head[vocabulary].to(dtype),
            "norm": load("model.norm.weight", torch.float32),
            "cos": torch.from_numpy(cos)[:, None, :],
            "sin": torch.from_numpy(sin)[:, None, :],
        }.items():
            self.register_buffer(name, values, persistent=False)

    @property
    def layers(self) -> list[dict[str, Tensor]]:
        names = self.config.layer_tensors()
        return [
            {name: self.get_parameter(_registered(index, name)) for name in names}
            for index in range(self.exit_config.num_layers)
        ]

    @property
    def mixing(self) -> dict[str, Tensor]:
        names = ("fuse", "mix", "token_norm", "feature_norm") if self.exit_config.features else ()
        return {name: self.get_parameter(name) for name in names}

    @property
    def device(self) -> torch.device:
        return self.head.device

    def trained_exit(
        self,
        fingerprint: str,
        num_draft_tokens: int,
        notes: Mapping[str, Any] | None = None,
        vocabulary: Tensor | None = None,
    ) -> TrainedExit:
        """What has been trained, sharing its memory where it is on the CPU.

        Args:
            vocabulary: to draft from, int64 [n], rising; None: the one of training.
        """

        def arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
            return {name: values.detach().cpu().float().numpy() for name, values in tensors.items()}

        return TrainedExit(
            self.exit_config,
            (self.vocabulary if vocabulary is None else vocabulary).cpu().int().numpy(),
            [arrays(layer) for layer in self.layers],
            arrays(self.mixing),
            fingerprint,
            num_draft_tokens,
            notes or {},
        )

    def scale_to(self, states_NAD: Tensor) -> None:
        """Let an exit with features begin near the last one itself: normalised, then brought back to its usual size,
        with a tenth of that for the token.

        Args:
            states_NAD: outputs of the tapped layers at some tokens, those of the last layer at the end.
        """
        if not self.exit_config.features:
            return
        size = self.config.hidden_size
        rms = float(states_NAD[:, -1].float().square().mean(-1).sqrt().median())
        with torch.no_grad():
            self.fuse[:, -size:] = torch.eye(size) * rms
            nn.init.orthogonal_(self.mix[:, :size], gain=rms / 10)

    def start_from(self, initial: TrainedExit) -> None:
        """Take the weights of an exit of the same shape, whatever model and vocabulary it was trained for."""
        own = {f"layers.{i}.{name}": values for i, layer in enumerate(self.layers) for name, values in layer.items()}
        own |= self.mixing
        with torch.no_grad():
            for name, values in initial.tensors().items():
                own[name].copy_(torch.tensor(np.asarray(values)))

    def forward(self, batch: Batch, config: FitConfig, counts_2J: Tensor) -> Tensor:
        """The loss of one batch, as a part of the batches of an optimizer step.

        Args:
            counts_2J: of all these batches, see `num_positions`.
        """
        targets_Pn = self.targets(batch)
        loss = torch.zeros((), device=self.device)
        for step, logits_Pn in enumerate(self.unroll(batch, config.unroll_steps)):
            # a draft's j-th token exists from the j-th predicted position on
            keep_P, counts = batch.first_P >= step, counts_2J[:, step]
            part = distillation_loss(logits_Pn, targets_Pn, batch.next_P, keep_P, config.hard_weight, counts)
            loss = loss + config.step_discount**step * part
        return loss

    def unroll(self, batch: Batch, num_steps: int) -> Iterator[Tensor]:
        """Logits [P, n] of every unroll step in turn."""
        # in the precision of the products, once for all steps
        mixing = Mixing({name: t.to(self._dtype) for name, t in self.mixing.items()}, self.config.rms_norm_eps)
        layers = [LayerWeights.fused(self.config, partial(self._part, layer)) for layer in self.layers]
        past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
        f_BTD = mixing.fuse(batch.features_BTAD) if self.exit_config.features else None
        for _ in range(num_steps):
            h_BTD = batch.x_BTD if f_BTD is None else mixing.mix(batch.x_BTD, f_BTD)
            for layer, own_past in zip(layers, past, strict=True):
                h_BTD = self._layer(h_BTD, layer, own_past)
            yield self._unembed(h_BTD.flatten(0, 1)[batch.places_P])
            if f_BTD is None:
                return  # without features every step sees the same
            f_BTD = F.pad(h_BTD, (0, 0, 1, 0))[:, :-1]

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """The model's own probabilities over the draft vocabulary, [P, n]."""
        return self._unembed(batch.final_PD).softmax(dim=-1)

    def _unembed(self, h_PD: Tensor) -> Tensor:
        return _linear(rms_norm(h_PD, self.norm, self.config.rms_norm_eps), self.head)

    def _part(self, layer: Mapping[str, Tensor], *names: str) -> Tensor:
        """Tensors of a layer, one below the other, matrices in the precision of the products."""
        tensors = [layer[name].to(self._dtype) if layer[name].ndim > 1 else layer[name] for name in names]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _layer(self, h_BTD: Tensor, layer: LayerWeights, past: list[tuple[Tensor, Tensor]]) -> Tensor:
        def attend(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2).to(self._dtype) for part in (q_BTHE, k_BTKE, v_BTKE))
            past.append((k, v))
            return attend_unrolled(q, past, self.config.sliding_window).transpose(1, 2).float()

        length = h_BTD.shape[1]
        rotation = self.cos[:length], self.sin[:length]
        return decoder_layer(h_BTD, layer, self.config, rotation, attend, _linear)


def _empty(config: ModelConfig, name: str, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(expected_tensors(config)[name], dtype=dtype or torch.bfloat16)


def _registered(index: int, name: str) -> str:
    """A layer's tensor as a parameter of the module, whose names have no dots."""
    return f"layers_{index}_{name.replace('.', '_')}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product in the weight's precision; the rest goes on in float32."""
    out = F.linear(x.to(weight.dtype), weight).float()
    return out if bias is None else out + bias


def attend_unrolled(q_BHTE: Tensor, past: Seq[tuple[Tensor, Tensor]], sliding_window: int | None = None) -> Tensor:
    """Attention of unroll step j = len(past): a query at position i sees the first step's keys up to i - j + 1, then
    one key of each later step m at position i - j + m, its own among them; none of them `sliding_window` or more
    positions before it.

    Args:
        past: keys and values [B, K, T, E] of the steps so far, this one's last.
    """
    groups = q_BHTE.shape[1] // past[0][0].shape[1]
    k, v = (torch.cat(parts, dim=2).repeat_interleave(groups, dim=1) for parts in zip(*past, strict=True))
    length = q_BHTE.shape[2]
    if len(past) == 1 and (sliding_window is None or sliding_window >= length):
        return F.scaled_dot_product_attention(q_BHTE, k, v, is_causal=True)
    mask = _visible(len(past), length, sliding_window, q_BHTE.device)
    return F.scaled_dot_product_attention(q_BHTE, k, v, attn_mask=mask)


def _visible(num_steps: int, length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which keys of all steps, one step's after the other's, the queries of the last one see: bool [T, J * T]."""
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    parts = [key <= query - num_steps + 1]
    parts += [key == query - num_steps + step for step in range(2, num_steps + 1)]
    mask = torch.cat(parts, dim=1)
    return mask if sliding_window is None else mask & (key > query - sliding_window).repeat(1, num_steps)


def num_positions(batch: Batch, num_steps: int) -> Tensor:
    """How many positions each unroll step learns from, and of how many of them the next token is in the draft
    vocabulary: int64 [2, J]."""
    kept_JP = batch.first_P >= torch.arange(num_steps, device=batch.first_P.device)[:, None]
    return torch.stack((kept_JP.sum(1), (kept_JP & (batch.next_P >= 0)).sum(1)))


def distillation_loss(
    logits_Pn: Tensor, targets_Pn: Tensor, next_P: Tensor, keep_P: Tensor, hard_weight: float, counts_2: Tensor
) -> Tensor:
    """Mean over kept positions of the cross-entropy to the model's distribution, and to its own next token where the
    draft vocabulary has it, the latter weighted. Nothing is kept: zero.

    Args:
        targets_Pn: the model's probabilities.
        next_P: index of its own token, -1 where the vocabulary does not have it.
        counts_2: what the means are over: kept positions, and those of them whose next token the vocabulary has; of
            this batch, or of all that an optimizer step takes together.
    """
    num_kept, num_known = counts_2
    known_P = keep_P & (next_P >= 0)
    soft, hard = 1 - hard_weight * (num_known > 0), hard_weight / num_known.clamp(min=1)
    # both in one target: logits are large, and every pass over them costs as much as a layer
    targets_Pn = targets_Pn * (keep_P * (soft / num_kept.clamp(min=1)))[:, None]
    targets_Pn.scatter_add_(1, next_P.clamp(min=0)[:, None], (known_P * hard)[:, None])
    return F.cross_entropy(logits_Pn, targets_Pn, reduction="sum")


def make_optimizer(trainer: ExitTrainer, config: FitConfig) -> torch.optim.AdamW:
    matrices = [p for p in trainer.parameters() if p.ndim > 1]
    vectors = [p for p in trainer.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
