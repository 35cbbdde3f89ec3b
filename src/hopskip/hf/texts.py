"""A batch of texts on its way through a transformers model: passes, choices of tokens, and what is kept of them.

Shape letters: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList, logits_process

from hopskip.hf.model import rewindable

WITH_STATE = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
OF_TRANSFORMERS = frozenset(kind for kind in vars(logits_process).values() if isinstance(kind, type))
"""Processors whose results depend on tokens and scores alone (but for `WITH_STATE`). Others are not shown drafts: they
may count how often they are called."""


class Texts:
    """A batch on its way through the model. While decoding, the cache has the keys and values of all tokens but the
    last.

    Args:
        input_ids: [B, T]; none for a prompt of embeddings.
        inputs: what the model's forward takes besides.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        config: GenerationConfig,
        inputs: dict[str, Any],
    ) -> None:
        self.ids = input_ids
        self.cache: DynamicCache = rewindable(inputs.get("past_key_values"), inputs.get("use_cache"))
        self.num_cached = self.cache.get_seq_length()
        """Positions that every layer of the cache has, and that stay whatever happens."""
        self.mask: Tensor | None = inputs.get("attention_mask")
        self.embeds: Tensor | None = inputs.get("inputs_embeds")
        self._given_positions: Tensor | None = inputs.get("position_ids")
        self.next_position: Tensor | None = None
        self.config = config
        self._processor = logits_processor
        self._draft_processor = LogitsProcessorList(
            [p for p in logits_processor if type(p) in OF_TRANSFORMERS and type(p).__name__ not in WITH_STATE]
        )
        self._criteria = stopping_criteria
        eos = getattr(config, "_eos_token_tensor", None)
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._eos: Tensor | None = eos if self._pads else None
        self._pad: Any = getattr(config, "_pad_token_tensor", None)
        self.going = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        """[B]: texts that have not ended."""
        self._noise: list[Tensor] = []
        returns = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if returns and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if returns and config.output_logits else None

    # -- passes --------------------------------------------------------------------------------------------------------

    def read_prompt(self, model: Any) -> Tensor:
        """Logits after the prompt, [B, V]."""
        mask, given = self.mask, self._given_positions
        whole = self.ids if self.embeds is None else self.embeds
        num_new = whole.shape[1] - self.num_cached
        seen = mask.shape[1] if mask is not None else getattr(self.config, "_mask_length", whole.shape[1])
        if seen != whole.shape[1] and self.embeds is None:
            num_new = whole.shape[1]  # the cached tokens were left out
        if num_new < 1:
            raise ValueError("the cache holds the whole prompt already; give at least one token after what it holds")
        end = self.num_cached + num_new
        if mask is None or given is not None:
            after = end if given is None else given[..., -1:].expand(len(whole), 1) + 1
        else:
            after = mask.long().sum(-1, keepdim=True)
            given = (mask.long().cumsum(-1) - 1).clamp(min=0)
        chunk = getattr(self.config, "prefill_chunk_size", None) or num_new
        logits = None
        for start in range(self.num_cached, end, chunk):
            stop = min(start + chunk, end)
            part = whole[:, start - end : whole.shape[1] + stop - end]
            inputs = {"input_ids": part} if self.embeds is None else {"inputs_embeds": part}
            if given is not None:
                inputs["position_ids"] = given[..., start - end : given.shape[-1] + stop - end]
            logits = self._run(model, start, stop, logits_to_keep=1, **inputs)
            self.num_cached = stop
        assert logits is not None
        self.next_position = torch.as_tensor(after, device=whole.device).reshape(-1, 1)
        return logits[:, -1]

    def run(self, model: Any, ids: Tensor, *, offset: int = 0, logits_to_keep: int = 0) -> Tensor:
        """Logits [B, T, V] of tokens [B, T] that come `offset` positions after the cached ones."""
        assert self.next_position is not None
        count = ids.shape[1]
        positions = self.next_position + torch.arange(offset, offset + count, device=ids.device)
        start = self.num_cached + offset
        return self._run(
            model,
            start,
            start + count,
            input_ids=ids,
            position_ids=positions.expand(len(ids), count),
            logits_to_keep=logits_to_keep,
        )

    def mask_to(self, stop: int) -> Tensor | None:
        """The attention mask of the first `stop` positions, [B, stop]."""
        if self.mask is None:
            return None
        num_new = stop - self.mask.shape[1]
        if num_new <= 0:
            return self.mask[:, :stop]
        return torch.cat((self.mask, self.mask.new_ones(len(self.mask), num_new)), dim=1)

    def _run(self, model: Any, start: int, stop: int, **inputs: Any) -> Tensor:
        found: Tensor = model(
            attention_mask=self.mask_to(stop),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **inputs,
        ).logits
        return found

    def advance(self, number: int) -> None:
        """So many of the positions of the last pass stay."""
        assert self.next_position is not None
        self.num_cached += number
        self.next_position = self.next_position + number
        self.rewind()

    def rewind(self, layers: Sequence[Any] | None = None) -> None:
        """Cut the cache, or some layers of it, back to `num_cached` positions."""
        for layer in self.cache.layers if layers is None else layers:
            excess = layer.get_seq_length() - self.num_cached
            if excess > 0 or layer.is_sliding:  # windows forget then what nobody needs
                layer.crop(-max(0, excess))

    # -- tokens --------------------------------------------------------------------------------------------------------

    def choose(self, scores_BV: Tensor, ahead: int) -> Tensor:
        """The token of each text, `ahead` places after the next one: [B]."""
        if not self.config.do_sample:
            return scores_BV.argmax(dim=-1)
        probs_BV = scores_BV.softmax(dim=-1)
        while len(self._noise) <= ahead:
            self._noise.append(torch.empty_like(probs_BV).exponential_())
        return (probs_BV / self._noise[ahead]).argmax(dim=-1)

    def draft_token(self, ids: Tensor, logits_BV: Tensor, going: Tensor, ahead: int) -> Tensor:
        """What is drafted after tokens [B, T]: [B]."""
        scores_BV = self._draft_processor(ids, logits_BV.to(copy=True, dtype=torch.float32, device=ids.device))
        return self._padded(self.choose(scores_BV, ahead), going)

    def ends(self, tokens: Tensor) -> Tensor:
        """[B]: which of these tokens end a text."""
        return torch.zeros_like(self.going) if self._eos is None else torch.isin(tokens, self._eos.to(tokens.device))

    def commit(self, logits_BV: Tensor) -> Tensor:
        """Choose the next token of each text, as `generate` does: [B]."""
        logits_BV = logits_BV.to(copy=True, dtype=torch.float32, device=self.ids.device)
        scores_BV = self._processor(self.ids, logits_BV)
        if self.scores is not None:
            self.scores += (scores_BV,)
        if self.logits is not None:
            self.logits += (logits_BV,)
        tokens = self._padded(self.choose(scores_BV, 0), self.going)
        del self._noise[:1]
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
        self.going = self.going & ~self._criteria(self.ids, self.scores)
        return tokens

    def _padded(self, tokens: Tensor, going: Tensor) -> Tensor:
        """Texts that have ended go on with padding."""
        return tokens if not self._pads else torch.where(going, tokens, self._pad.to(tokens.device))

    @property
    def is_finished(self) -> bool:
        return not bool(self.going.any())
