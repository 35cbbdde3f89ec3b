"""A trained exit (`hopskip.checkpoint.trained_exit`) as the drafter of a transformers model in memory.

Shape letters: B texts, T tokens, A taps, D hidden size, n draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import Mixing, TrainedExit, Weights
from hopskip.hf.model import decoder_of, view_of
from hopskip.hf.texts import Texts


def config_of(model: Any) -> ModelConfig:
    """The shape of a model in memory.

    Raises:
        CheckpointError: hopskip does not run its architecture.
    """
    return ModelConfig.from_hf(model.config.to_dict())


def load_exit(model: Any, exit_branch: str | Path | TrainedExit) -> TrainedExit:
    """A trained exit that fits a model. Whether it was trained for these very weights, nobody can know of a model in
    memory: one that was not only drafts worse.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is for models of another shape.
    """
    trained = exit_branch if isinstance(exit_branch, TrainedExit) else _read(str(exit_branch))
    trained.check(config_of(model))
    return trained


@lru_cache(maxsize=4)
def _read(folder: str) -> TrainedExit:
    return TrainedExit.load(Path(folder))


class _Tap(nn.Module):
    """A layer whose outputs are kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(*args, **kwargs)
        self.seen.append(out[0] if isinstance(out, tuple) else out)
        return out


class ExitBranch:
    """Drafts with a trained exit. Its keys and values lie in a cache of its own; a row of it is a token and the
    features of the token before."""

    def __init__(self, model: Any, trained: TrainedExit) -> None:
        decoder, config = decoder_of(model), trained.config
        weight = model.get_output_embeddings().weight
        taps = {tap: _Tap(decoder.layers[tap - 1]) for tap in config.taps} if config.num_layers else {}
        self.target = view_of(model, [taps.get(index + 1, layer) for index, layer in enumerate(decoder.layers)])
        self._taps = list(taps.values())
        self._columns = [config.taps.index(feature) for feature in config.features]
        self._start, self._start_column = config.start, config.taps.index(config.start) if config.start else 0
        self._embed, self._norm = decoder.embed_tokens, decoder.norm
        self._first_layers = _bare(model, list(decoder.layers[: config.start]))
        self._own_layers = _bare(model, [_layer(model, index, part) for index, part in enumerate(trained.layers)])
        self._num_own = config.num_layers
        self._vocabulary = torch.tensor(trained.vocabulary_list, device=weight.device)
        self._head = weight[self._vocabulary]
        mixing = {name: _placed(values, weight) for name, values in trained.mixing.items()}
        self._mixing = Mixing(mixing, config_of(model).rms_norm_eps) if mixing else None
        self._vocab_size = weight.shape[0]
        self._cache = DynamicCache()
        self._first: int | None = None
        self._seen_BTAD: Tensor | None = None

    def propose(self, texts: Texts, num_tokens: int) -> list[Tensor]:
        ids, going = texts.ids, texts.going
        drafts: list[Tensor] = []
        hidden_BD = self._enter(texts)
        while True:
            logits_BV = hidden_BD.new_full((len(hidden_BD), self._vocab_size), -torch.inf)
            logits_BV[:, self._vocabulary] = F.linear(self._norm(hidden_BD), self._head)
            token = texts.draft_token(ids, logits_BV, going, len(drafts))
            drafts.append(token)
            ids = torch.cat((ids, token[:, None]), dim=1)
            going = going & ~texts.ends(token)
            if len(drafts) == num_tokens or not bool(going.any()):
                break
            hidden_BD = self._advance(texts, token, hidden_BD, len(drafts))
        texts.rewind(texts.cache.layers[: self._start])
        if self._num_own and len(drafts) > 1:
            self._cache.crop(1 - len(drafts))
        return drafts

    def _enter(self, texts: Texts) -> Tensor:
        """Take the exit through the tokens that it has yet to see: its output at the last one, [B, D]."""
        if not self._num_own:
            return self._token_states(texts, texts.ids[:, -1:], 0)[:, -1]
        seen_BTAD = self._observed(texts)
        assert self._first is not None
        begin = self._first + self._cache.get_seq_length()
        count = texts.num_cached + 1 - begin
        ids = texts.ids[:, -count:]
        if self._start:
            own_BTD = seen_BTAD[:, -(count - 1) :, self._start_column] if count > 1 else seen_BTAD[:, :0, 0]
            states_BTD = torch.cat((own_BTD, self._token_states(texts, ids[:, -1:], 0)), dim=1)
        else:
            states_BTD = self._embed(ids)
        if self._mixing is not None:
            before_BTAD = seen_BTAD[:, -count:]
            if before_BTAD.shape[1] < count:  # before the first token there is none
                before_BTAD = F.pad(before_BTAD, (0, 0, 0, 0, 1, 0))
            if (mask := texts.mask_to(texts.num_cached + 1)) is not None:
                kept = F.pad(mask, (1, 0))[:, begin : begin + count].bool()
                before_BTAD = torch.where(kept[:, :, None, None], before_BTAD, 0)
            states_BTD = self._mixing.mix(states_BTD, self._mixing.fuse(before_BTAD[:, :, self._columns]))
        self._seen_BTAD = seen_BTAD[:, -1:]  # of the token before the next one to enter
        return self._through(texts, states_BTD, begin)[:, -1]

    def _observed(self, texts: Texts) -> Tensor:
        """Features [B, T, A, D] of the last T cached positions: at least of those that the exit wants now."""
        parts = [torch.stack(outputs, dim=2) for outputs in zip(*(tap.seen for tap in self._taps), strict=True)]
        for tap in self._taps:
            tap.seen.clear()
        if not self._taps:
            if self._first is None:
                self._first = max(0, texts.num_cached + 1 - texts.ids.shape[1])
            return torch.zeros((len(texts.ids), 1, 1, 1), device=texts.ids.device)
        new_BTAD = torch.cat(parts, dim=1)
        if self._first is None:  # the prompt; of what a cache held before it nothing is known
            start = texts.num_cached - new_BTAD.shape[1]
            self._first = max(start + 1 if start else 0, texts.num_cached + 1 - texts.ids.shape[1])
            return new_BTAD
        assert self._seen_BTAD is not None
        num_new = texts.num_cached + 1 - self._first - self._cache.get_seq_length()
        return torch.cat((self._seen_BTAD, new_BTAD[:, :num_new]), dim=1)

    def _advance(self, texts: Texts, token: Tensor, hidden_BD: Tensor, ahead: int) -> Tensor:
        """The exit's output at a token just drafted, its own output before it in place of features: [B, D]."""
        states_BTD = self._token_states(texts, token[:, None], ahead)
        if self._mixing is not None:
            states_BTD = self._mixing.mix(states_BTD, hidden_BD[:, None])
        if not self._num_own:
            return states_BTD[:, -1]
        return self._through(texts, states_BTD, texts.num_cached + ahead)[:, -1]

    def _token_states(self, texts: Texts, ids: Tensor, ahead: int) -> Tensor:
        """Of tokens [B, T], where the exit begins: [B, T, D]."""
        states_BTD: Tensor = self._embed(ids)
        if not self._start:
            return states_BTD
        begin = texts.num_cached + ahead
        return _run(self._first_layers, texts, states_BTD, begin, texts.mask_to(begin + ids.shape[1]), texts.cache)

    def _through(self, texts: Texts, states_BTD: Tensor, begin: int) -> Tensor:
        assert self._first is not None
        mask = texts.mask_to(begin + states_BTD.shape[1])
        mask = None if mask is None else mask[:, self._first :]
        return _run(self._own_layers, texts, states_BTD, begin, mask, self._cache)


def _run(
    decoder: Any, texts: Texts, states_BTD: Tensor, begin: int, mask: Tensor | None, cache: DynamicCache
) -> Tensor:
    """Layers on the positions of the texts from `begin` on."""
    assert texts.next_position is not None
    steps = torch.arange(states_BTD.shape[1], device=states_BTD.device) + (begin - texts.num_cached)
    positions = (texts.next_position + steps).clamp(min=0).expand(states_BTD.shape[:2])
    found: Tensor = decoder(
        inputs_embeds=states_BTD, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return found


def _bare(model: Any, layers: list[Any]) -> Any:
    """The model's decoder with other layers, and without the norm behind them."""
    decoder = decoder_of(view_of(model, layers))
    decoder._modules["norm"] = nn.Identity()
    return decoder


def _layer(model: Any, index: int, tensors: Mapping[str, Weights]) -> nn.Module:
    """A layer of the model's own kind with these weights."""
    decoder = decoder_of(model)
    with torch.device("meta"):
        layer: nn.Module = type(decoder.layers[0])(decoder.config, index)
    like = model.get_output_embeddings().weight
    layer.load_state_dict({name: _placed(values, like) for name, values in tensors.items()}, assign=True)
    return layer.eval()


def _placed(values: Weights, like: Tensor) -> Tensor:
    return torch.tensor(np.asarray(values), device=like.device, dtype=like.dtype)
