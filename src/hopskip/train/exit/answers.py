"""Answers of this engine, with the hidden states that decoding leaves behind.

Shape letters: S slots, T positions, N rows, A taps (layers whose output is kept), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.draft.base import Draft, Drafter
from hopskip.engine.engine import Engine
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.turns import Dialogue


class _States(Drafter):
    """Keeps the outputs of some layers at every position that a sequence has in the cache, and drafts nothing.

    A prompt may begin with what an earlier one has left in the cache. The states are there too: they are kept by slot
    and position, and copied when the cache is.
    """

    def __init__(self, taps: Seq[int], num_slots: int, length: int, hidden_size: int) -> None:
        self.taps = tuple(taps)
        self.states_STAD = torch.empty((num_slots, length, len(self.taps), hidden_size), dtype=torch.bfloat16)

    def observe(self, rows: Rows, features_NAD: Array) -> None:
        slots, positions = torch.from_numpy(rows.slots).long(), torch.from_numpy(rows.positions).long()
        self.states_STAD[slots, positions] = torch.as_tensor(features_NAD).to("cpu", torch.bfloat16)

    def copy(self, source: int, target: int, length: int) -> None:
        self.states_STAD[target, :length] = self.states_STAD[source, :length]

    def propose(self, sequences: Seq[Sequence], limits: Seq[int], cache: Cache) -> list[Draft]:
        return [Draft() for _ in sequences]

    def of(self, sequence: Sequence) -> Tensor:
        """Of all tokens but the last, which was not fed back: [T - 1, A, D]. A copy, as the slot is used again."""
        return self.states_STAD[sequence.slot, : len(sequence.token_ids) - 1].clone()


class OwnAnswers:
    """Lets the model answer greedily, many dialogues at once.

    Args:
        taps: layers after which hidden states are kept, rising; empty: none are.
        max_length: most tokens of a prompt and its answer.
    """

    def __init__(
        self,
        backend: Backend,
        taps: Seq[int],
        *,
        max_new_tokens: int,
        max_length: int,
        eos_token_ids: Seq[int],
        max_num_seqs: int = 64,
    ) -> None:
        self._states = _States(taps, max_num_seqs, max_length, backend.config.hidden_size) if taps else None
        self._engine = Engine(
            backend,
            SpeculativeConfig(draft="none"),
            self._states,
            eos_token_ids=eos_token_ids,
            max_num_seqs=max_num_seqs,
        )
        self._params = SamplingParams(max_new_tokens=max_new_tokens)

    def __call__(
        self, dialogues: Seq[Dialogue], doing: Callable[[int], None] = lambda number: None
    ) -> list[list[Conversation]]:
        """The turns of each dialogue, each with its history.

        Args:
            doing: told how many dialogues have ended.
        """
        found: list[list[Conversation]] = [[] for _ in dialogues]
        answers: list[list[list[int]]] = [[] for _ in dialogues]
        running: dict[int, tuple[int, Sequence]] = {}
        num_ended = 0

        def go_on(index: int) -> bool:
            prompt = dialogues[index](answers[index])
            if prompt is not None:
                sequence = self._engine.add(Request(prompt, self._params))
                running[sequence.number] = index, sequence
            return prompt is not None

        num_ended += sum(not go_on(index) for index in range(len(dialogues)))
        while running:
            self._engine.step()
            for number, (index, sequence) in list(running.items()):
                if not sequence.is_finished:
                    continue
                del running[number]
                size = sequence.num_prompt_tokens
                prompt, answer = sequence.token_ids[:size], sequence.token_ids[size:]
                states = None if self._states is None else self._states.of(sequence)
                found[index].append(Conversation.of(prompt, answer, states))
                answers[index].append(answer)
                if not go_on(index):
                    num_ended += 1
                    doing(num_ended)
        return found
