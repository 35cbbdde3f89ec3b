"""lm-eval's view of a model, at its last layer or at an early exit. Needs the extra `lm-eval`.

Shape letters: N rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from hopskip.backends.rows import Rows, Segment
from hopskip.errors import ConfigError
from hopskip.llm import LLM
from hopskip.sampling import logprobs_of

_MAX_NEW_TOKENS = 256
_ROWS_AT_ONCE = 256  # of logits: bounds their memory

Score = tuple[float, bool]
"""The log-probability of a continuation, and whether each of its tokens is the most probable."""


class Scores:
    """Continuations scored after several numbers of layers in one pass, and remembered.

    Args:
        stops: numbers of layers, rising; the last is all of them.
    """

    def __init__(self, llm: LLM, stops: Seq[int]) -> None:
        self._backend, self.stops = llm.backend, tuple(stops)
        self.max_length = llm.engine.max_model_len
        self._cache = self._backend.new_cache(1, self.max_length)
        self._known: dict[tuple[tuple[int, ...], int], dict[int, Score]] = {}

    def score(self, ids: Seq[int], number: int) -> dict[int, Score]:
        """Of the last `number` tokens, by the number of layers. Tokens on the left beyond the context are left out."""
        ids = tuple(ids[-(self.max_length + 1) :])
        number = min(number, len(ids) - 1)
        if (ids, number) not in self._known:
            self._known[ids, number] = self._score(ids, number)
        return self._known[ids, number]

    def _score(self, ids: tuple[int, ...], number: int) -> dict[int, Score]:
        backend, found, start = self._backend, {}, 0
        hidden_ND, following = backend.embed(ids[:-1]), ids[len(ids) - number :]
        rows = Rows([Segment(0, 0, len(ids) - 1)])
        for stop in self.stops:
            hidden_ND, start = backend.run_layers(hidden_ND, start, stop, rows, self._cache).hidden_ND, stop
            total, is_best, first = 0.0, True, len(ids) - 1 - number
            for begin in range(0, number, _ROWS_AT_ONCE):
                tokens = following[begin : begin + _ROWS_AT_ONCE]
                some_ND = hidden_ND[first + begin : first + begin + len(tokens)]
                for logits_V, token in zip(backend.on_host(backend.logits(some_ND)), tokens, strict=True):
                    total += float(logprobs_of(logits_V)[token])
                    is_best &= int(np.argmax(logits_V)) == token
            found[stop] = total, is_best
        return found


class HopskipLM(TemplateLM):  # type: ignore[misc]
    """A model for `lm_eval.simple_evaluate`.

    Args:
        scores: of the same `llm`; several of these share one.
        stop: the number of layers that are read, one of `scores.stops`.
    """

    def __init__(self, llm: LLM, scores: Scores, stop: int) -> None:
        super().__init__()
        self._llm, self._scores, self._stop = llm, scores, stop

    @property
    def eot_token_id(self) -> int:
        return int(self._llm.tokenizer.eos_token_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """The beginning-of-text token where there is one, as lm-eval's own `hf` takes it."""
        bos = self._llm.tokenizer.special_tokens.get("bos_token")
        token = None if bos is None else self._llm.tokenizer.special_id(bos)
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return "hopskip"

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return self._llm.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self._llm.tokenizer
        bos = tokenizer.special_tokens.get("bos_token")
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> list[Score]:
        found = []
        for key, context, continuation in requests:
            score = self._scores.score([*context, *continuation], len(continuation))[self._stop]
            found.append(score)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scores.max_length,
                context_len=1,
            )
            parts = map(utils.make_disjoint_window, windows)
            total = sum(self._scores.score([*c, *t], len(t))[self._stop][0] for c, t in parts)
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """At all layers as `LLM` generates, drafts and all. At an exit token by token, and greedily only.

        Raises:
            ConfigError: a task draws its texts from an exit.
        """
        found = []
        for context, asked in (request.args for request in requests):
            until = asked.get("until") or []
            stops = [until] if isinstance(until, str) else [text for text in until if text]
            most = int(asked.get("max_gen_toks", _MAX_NEW_TOKENS))
            temperature = float(asked.get("temperature", 1.0)) if asked.get("do_sample") else 0.0
            ids = self.tok_encode(context)[-max(1, self._scores.max_length - most) :]
            if self._stop == self._scores.stops[-1]:
                drawn = {name: asked[name] for name in ("top_p", "top_k") if temperature and name in asked}
                options: Any = {"max_new_tokens": most, "stop": stops, "temperature": temperature, **drawn}
                text = self._llm.generate([ids], use_tqdm=False, **options)[0].text
            elif temperature:
                raise ConfigError("a task draws its texts, which is done after all layers only; leave exit_layers out")
            else:
                text = self._at_exit(ids, most, stops)
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, asked), text)
        return found

    def _at_exit(self, ids: list[int], most: int, stops: list[str]) -> str:
        backend, tokenizer = self._llm.backend, self._llm.tokenizer
        cache = backend.new_cache(1, len(ids) + most)
        new: list[int] = []
        rows, start, text = ids, 0, ""
        while len(new) < most:
            place = Rows([Segment(0, start, len(rows))])
            hidden_ND = backend.run_layers(backend.embed(rows), 0, self._stop, place, cache).hidden_ND
            [token] = backend.greedy(hidden_ND[-1:])
            if token in tokenizer.eos_token_ids:
                break
            new.append(token)
            text = tokenizer.decode(new, after=ids)
            if ends := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(ends)]
            start, rows = start + len(rows), [token]
        return text


def evaluate(llm: LLM, stops: Seq[int], tasks: Seq[str], **options: Any) -> list[dict[str, Any]]:
    """Scores of tasks after each number of layers: rows of `exit_layer` (None: all layers), `task`, `metric`, `value`
    and `error`, the standard error where lm-eval gives one.

    Args:
        stops: numbers of layers, rising.
        options: of `lm_eval.simple_evaluate` (`num_fewshot`, `limit`, `task_manager`, ...).
    """
    from lm_eval import simple_evaluate

    depth = llm.backend.config.num_hidden_layers
    scores, rows = Scores(llm, stops), []
    for stop in stops:
        results = simple_evaluate(model=HopskipLM(llm, scores, stop), tasks=list(tasks), log_samples=False, **options)[
            "results"
        ]
        for task, values in results.items():
            for name, value in values.items():
                metric, _, of = name.partition(",")
                if isinstance(value, int | float) and of and not metric.endswith("_stderr"):
                    error = values.get(f"{metric}_stderr,{of}")
                    rows.append(
                        {
                            "exit_layer": None if stop == depth else stop,
                            "task": task,
                            "metric": metric if of == "none" else name,
                            "value": float(value),
                            "error": float(error) if isinstance(error, int | float) else None,
                        }
                    )
    return rows
