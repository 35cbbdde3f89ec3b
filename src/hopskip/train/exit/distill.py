"""Distillation of a trained exit from the model that it will draft for (`hopskip.checkpoint.trained_exit`).

The exit learns the model's next-token distribution over the draft vocabulary, at every token of the model's own
text, and also from its own outputs: unroll step j sees what draft step j will see, the verified features of j tokens
ago and after them what the exit itself put out (the training-time test of EAGLE-3, arXiv 2503.01840).

Shape letters: B conversations, T tokens, A features, D hidden size, H query heads, K key/value heads, E head dimension,
n draft vocabulary, P positions that are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hopskip.backends.torch.layer import LayerWeights, decoder_layer, rms_norm
from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.trained_exit import ExitConfig, Mixing, TrainedExit
from hopskip.train.exit.conversations import Conversation


@dataclass(frozen=True)
class Batch:
    """Conversations padded at the end to one length."""

    x_BTD: Tensor
    """What enters the exit for each token: its embedding, or the output of layer `start`."""
    features_BTAD: Tensor
    """Of the token before; zeros before the first."""
    final_PD: Tensor
    """The model's final hidden states at the predicted positions: they hold the targets."""
    next_P: Tensor
    """Index in the draft vocabulary of the model's own next token; -1 where it is not in it."""
    places_P: Tensor
    """Where the predicted positions lie in the flattened [B * T]."""
    first_P: Tensor
    """For each predicted position, how many predicted positions of its conversation come before it."""

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, part.name).to(device) for part in fields(self)))


class ExitTrainer(nn.Module):
    """The trainable half of an exit, with the frozen norm and head rows that it shares with the model.

    Args:
        dtype: of the matrix products; weights, norms, attention and losses are float32 in any case.
    """

    head: Tensor
    norm: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, checkpoint: Checkpoint, exit_config: ExitConfig, vocabulary: Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        config = self.config = checkpoint.config
        self.exit_config = exit_config
        self.vocabulary = vocabulary
        self._dtype = dtype
        size, depth = config.hidden_size, config.num_hidden_layers

        # the model's last layers are the nearest thing to what the exit must become
        first = depth - exit_config.num_layers
        for index in range(exit_config.num_layers):
            for name in config.layer_tensors():
                weights = load_tensor(checkpoint, f"model.layers.{first + index}.{name}", torch.float32)
                self.register_parameter(_registered(index, name), nn.Parameter(weights))
        if exit_config.features:
            self.fuse = nn.Parameter(torch.zeros(size, len(exit_config.features) * size))
            self.mix = nn.Parameter(torch.zeros(size, 2 * size))
            self.token_norm = nn.Parameter(torch.ones(size))
            self.feature_norm = nn.Parameter(torch.ones(size))
        head = load_tensor(checkpoint, "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
        cos, sin = config.rope.tables(config.context_length)
        for name, values in {
            "head": head[vocabulary].to(dtype),
            "norm": load_tensor(checkpoint, "model.norm.weight", torch.float32),
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

    def forward(self, batch: Batch, num_steps: int) -> Iterator[Tensor]:
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
            past.append((k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)))
            return attend_unrolled(q_BTHE.transpose(1, 2), past).transpose(1, 2)

        length = h_BTD.shape[1]
        rotation = self.cos[:length], self.sin[:length]
        return decoder_layer(h_BTD, layer, self.config, rotation, attend, _linear)


def _registered(index: int, name: str) -> str:
    """A layer's tensor as a parameter of the module, whose names have no dots."""
    return f"layers_{index}_{name.replace('.', '_')}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product in the weight's precision; the rest goes on in float32."""
    out = F.linear(x.to(weight.dtype), weight).float()
    return out if bias is None else out + bias


def attend_unrolled(q_BHTE: Tensor, past: Seq[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of unroll step j = len(past): a query at position i sees the first step's keys up to i - j + 1, then
    one key of each later step m at position i - j + m, its own among them.

    Args:
        past: keys and values [B, K, T, E] of the steps so far, this one's last.
    """
    step, length = len(past), q_BHTE.shape[2]
    groups = q_BHTE.shape[1] // past[0][0].shape[1]
    k, v = (tensor.repeat_interleave(groups, dim=1) for tensor in past[0])
    scores = (q_BHTE @ k.transpose(-1, -2)) * q_BHTE.shape[-1] ** -0.5
    is_hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(2 - step)
    parts = [scores.masked_fill(is_hidden, float("-inf"))]
    values = []
    for m in range(2, step + 1):
        shift = step - m
        k_m, v_m = (F.pad(x, (0, 0, shift, 0))[:, :, :length].repeat_interleave(groups, dim=1) for x in past[m - 1])
        parts.append((q_BHTE * k_m).sum(-1, keepdim=True) * q_BHTE.shape[-1] ** -0.5)
        values.append(v_m)
    # a position before the chain could have begun sees nothing of the first step; its result is not used
    weights = torch.cat(parts, dim=-1).softmax(dim=-1) if step > 1 else parts[0].softmax(dim=-1)
    out = weights[..., :length] @ v
    for m, v_m in enumerate(values):
        out = out + weights[..., length + m : length + m + 1] * v_m
    return out


def distillation_loss(
    logits_Pn: Tensor, targets_Pn: Tensor, next_P: Tensor, keep_P: Tensor, hard_weight: float
) -> Tensor:
    """Mean over kept positions of the cross-entropy to the model's distribution, and to its own next token where the
    draft vocabulary has it, the latter weighted.

    Args:
        targets_Pn: the model's probabilities.
        next_P: index of its own token, -1 where the vocabulary does not have it.
    """
    known_P = keep_P & (next_P >= 0)
    soft, hard = 1 - hard_weight * known_P.any(), hard_weight / known_P.sum().clamp(min=1)
    # both in one target: logits are large, and every pass over them costs as much as a layer
    targets_Pn = targets_Pn * (keep_P * (soft / keep_P.sum()))[:, None]
    targets_Pn.scatter_add_(1, next_P.clamp(min=0)[:, None], (known_P * hard)[:, None])
    return F.cross_entropy(logits_Pn, targets_Pn, reduction="sum")


def make_batch(
    conversations: Seq[Conversation], taps: Seq[int], exit_config: ExitConfig, index_V: Tensor, embedding: Tensor
) -> Batch:
    """Pad conversations to one batch.

    Args:
        taps: the layers whose outputs the conversations hold.
        index_V: for every token its index in the draft vocabulary, -1 for none.
        embedding: the model's, [V, D].
    """
    length = max(len(c.ids_T) - 1 for c in conversations)
    x, features, finals, nexts, places, firsts = [], [], [], [], [], []
    columns = [list(taps).index(layer) for layer in exit_config.features]
    for row, conversation in enumerate(conversations):
        ids, states = conversation.ids_T, conversation.states_TAD
        count, first = len(ids) - 1, conversation.num_prompt_tokens - 1
        own = states[:, list(taps).index(exit_config.start)].float() if exit_config.start else embedding[ids[:-1]]
        x.append(F.pad(own, (0, 0, 0, length - count)))
        features.append(F.pad(states[:-1, columns].float(), (0, 0, 0, 0, 1, length - count)))
        finals.append(states[first:, -1].float())
        nexts.append(index_V[ids[first + 1 :]])
        places.append(torch.arange(first, count) + row * length)
        firsts.append(torch.arange(count - first))
    return Batch(
        torch.stack(x), torch.stack(features), torch.cat(finals), torch.cat(nexts), torch.cat(places), torch.cat(firsts)
    )


def acceptance(correct_JP: Tensor, first_P: Tensor) -> Tensor:
    """Share of drafts whose first j tokens are all right, for j = 1..J: float [J].

    Args:
        correct_JP: whether the draft's j-th token, drawn at this position, is the model's own.
        first_P: index of each position within its conversation.
    """
    shares = []
    alive_P = torch.ones_like(correct_JP[0])  # drafts by the position of their latest token
    for step, correct_P in enumerate(correct_JP):
        if step:
            alive_P = F.pad(alive_P, (1, 0), value=False)[:-1] & (first_P >= step)
        alive_P = alive_P & correct_P
        shares.append(float(alive_P.sum()) / max(1, int((first_P >= step).sum())))
    return torch.tensor(shares)
