"""Self-speculative decoding behind `model.generate(custom_generate=...)`: the first layers of a model draft, the whole
model verifies, on one cache (LayerSkip, arXiv 2404.16710). Needs PyTorch and transformers alone.

Logits processors and stopping criteria of the text are called as `generate` calls them: once for each new token, in
order, on the whole batch. Rows of a batch go on together, as far as the least accepted of them. A drawn token is the
arg-max of probability over exponential noise, which is what `torch.multinomial` computes; drafts see the same noise. So
the text is that of plain `generate`: greedy, or drawn with the same seed.

Shape letters: B texts, T tokens, k draft tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from hopskip.hf.model import check_exit_layer, check_inputs, check_num_draft_tokens, decoder_of, view_of
from hopskip.hf.texts import Texts


class Drafter(Protocol):
    """Proposes what a model may say next."""

    target: nn.Module
    """The model, or a view of it that shows the drafter what it needs to see."""

    def propose(self, texts: Texts, num_tokens: int) -> list[Tensor]:
        """At most so many tokens, each [B], in order. Positions that it adds to the texts' cache it takes off again."""
        ...


class EarlyExit:
    """Drafts with the first layers of a model, its norm and head. Their keys and values lie where the model's own will.

    Args:
        exit_layer: how many layers draft.
    """

    def __init__(self, model: Any, exit_layer: int) -> None:
        self.target = model
        self._exit_layer = exit_layer
        self._draft = view_of(model, decoder_of(model).layers[:exit_layer])

    def propose(self, texts: Texts, num_tokens: int) -> list[Tensor]:
        ids, going = texts.ids, texts.going
        drafts: list[Tensor] = []
        for ahead in range(num_tokens):
            logits = texts.run(self._draft, ids[:, -1:], offset=ahead, logits_to_keep=1)[:, -1]
            token = texts.draft_token(ids, logits, going, ahead)
            drafts.append(token)
            ids = torch.cat((ids, token[:, None]), dim=1)
            going = going & ~texts.ends(token)
            if not bool(going.any()):
                break
        texts.rewind(texts.cache.layers[: self._exit_layer])
        return drafts


def decode(
    texts: Texts, drafter: Drafter, num_draft_tokens: int, streamer: Any = None, stats: dict[str, Any] | None = None
) -> Any:
    """Generate until all texts have ended; returns what `generate` returns.

    Args:
        streamer: gets the prompt, then each token, then the end.
        stats: is given counts: `num_target_passes` after the prompt's, `num_drafts`, `num_draft_tokens`,
            `num_accepted_tokens` and `num_accepted_tokens_per_pos`, of places in the batch.
    """
    counts = {} if stats is None else stats
    counts.update(num_target_passes=0, num_drafts=0, num_draft_tokens=0, num_accepted_tokens=0)
    per_pos = counts["num_accepted_tokens_per_pos"] = [0] * num_draft_tokens
    if streamer is not None:
        streamer.put(texts.ids.cpu())

    def commit(logits_BV: Tensor) -> Tensor:
        tokens = texts.commit(logits_BV)
        if streamer is not None:
            streamer.put(tokens.cpu())
        return tokens

    with _left_usable(texts):
        commit(texts.read_prompt(drafter.target))
        while not texts.is_finished:
            # the last token of a text is the target's, so that no draft reaches beyond it
            limit = min(num_draft_tokens, _room(texts) - 1)
            drafts = drafter.propose(texts, limit) if limit > 0 else []
            rows = torch.stack((texts.ids[:, -1], *drafts), dim=1)
            logits = texts.run(drafter.target, rows)
            num_accepted = 0
            for place in range(len(drafts) + 1):
                tokens = commit(logits[:, place])
                if place == len(drafts) or not torch.equal(tokens, drafts[place]):
                    break
                num_accepted += 1
                if texts.is_finished:
                    break
            texts.advance(place + 1)
            counts["num_target_passes"] += 1
            counts["num_drafts"] += bool(drafts)
            counts["num_draft_tokens"] += len(drafts)
            counts["num_accepted_tokens"] += num_accepted
            for index in range(num_accepted):
                per_pos[index] += 1
    if streamer is not None:
        streamer.end()
    if not texts.config.return_dict_in_generate:
        return texts.ids
    return GenerateDecoderOnlyOutput(
        sequences=texts.ids, scores=texts.scores, logits=texts.logits, past_key_values=texts.cache
    )


def _room(texts: Texts) -> int:
    """How many more tokens there may be."""
    most = texts.config.max_length
    return 2**31 if most is None else int(most) - texts.ids.shape[1]


@contextmanager
def _left_usable(texts: Texts) -> Iterator[None]:
    """Whatever happens, the cache holds the committed tokens alone afterwards."""
    try:
        yield
    except BaseException:
        texts.rewind()
        raise


def self_speculative(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    exit_layer: int | None = None,
    num_draft_tokens: int | None = None,
    token_streamer: Any = None,
    draft_stats: dict[str, Any] | None = None,
    **inputs: Any,
) -> Any:
    """For `generate(custom_generate=self_speculative, exit_layer=E)`: the model's first E layers draft.

    Args:
        exit_layer: 1 to L - 1; None: what the checkpoint recommends (`hopskip` in its config).
        num_draft_tokens: most tokens of a draft; None: what the checkpoint recommends, else 4.
        token_streamer: as `streamer` of `generate`, which does not reach a callable.
        draft_stats: a dict that is given counts, see `decode`.

    Raises:
        ValueError: a parameter cannot work here.
    """
    check_inputs(model, generation_config, inputs)
    drafter = EarlyExit(model, check_exit_layer(model, exit_layer))
    texts = Texts(input_ids, logits_processor, stopping_criteria, generation_config, inputs)
    return decode(texts, drafter, check_num_draft_tokens(model, num_draft_tokens), token_streamer, draft_stats)


def generate(
    *positional: Any,
    model: Any,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: Any = None,
    assistant_model: Any = None,
    custom_generate: Any = None,
    **arguments: Any,
) -> Any:
    """`model.generate` with the same arguments, and those of `self_speculative`: also with `streamer` and
    `stop_strings`, which do not reach a callable.

    Raises:
        ValueError: an argument cannot work here.
    """
    if assistant_model is not None:
        raise ValueError("assistant_model has no effect here: the model is its own draft model; leave it out")
    own = model.generation_config
    texts = stop_strings or (generation_config and generation_config.stop_strings) or own.stop_strings
    if texts:
        if tokenizer is None:
            raise ValueError(f"stop_strings={texts!r} need the model's tokenizer; give it as tokenizer")
        stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), StopStringCriteria(tokenizer, texts)])
        generation_config = generation_config and _without_stop_strings(generation_config)
        if own.stop_strings:  # it fills in what the call leaves out
            model = copy.copy(model)
            model.generation_config = _without_stop_strings(own)
    if streamer is not None:
        arguments["token_streamer"] = streamer
    # not `model.generate`, which may be this function
    return type(model).generate(
        model,
        *positional,
        generation_config=generation_config,
        stopping_criteria=stopping_criteria,
        custom_generate=custom_generate or self_speculative,
        **arguments,
    )


def _without_stop_strings(config: GenerationConfig) -> GenerationConfig:
    without = copy.deepcopy(config)
    without.stop_strings = None
    return without
