"""Training data for an exit: the model's own text, and the hidden states behind it, cached on disk.

Collected once and read for many epochs. A shard holds a fixed range of the prompts, so an interrupted collection goes
on with the first shard that is missing.

Shape letters: T tokens, A taps (layers whose output is kept), D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path

import torch
from torch import Tensor

from hopskip.backends.base import Backend
from hopskip.backends.rows import Array, Cache, Rows
from hopskip.draft.base import Draft, Drafter
from hopskip.engine.engine import Engine
from hopskip.errors import ConfigError
from hopskip.sampling_params import SamplingParams
from hopskip.sequence import Request, Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.train.exit.conversations import Conversation, shard_metadata, write_shard

SHARD_PROMPTS = 256


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


def collect(
    backend: Backend,
    prompts: Seq[Seq[int]],
    folder: Path,
    *,
    fingerprint: str,
    taps: Seq[int],
    max_new_tokens: int,
    eos_token_ids: Seq[int],
    max_num_seqs: int = 64,
    progress: Callable[[int, int], None] | None = None,
    doing: Callable[[float], None] = lambda share: None,
) -> None:
    """Let the model answer the prompts greedily, and write answers and states to `folder`.

    Args:
        fingerprint: of the model's weights; noted, so that no exit is trained on another model's states.
        taps: layers after which hidden states are kept, rising; those after the last layer always are. A folder that
            has more goes on with its own.
        progress: told the prompts done and the tokens collected so far, after each shard.
        doing: told the share of the prompts that are answered, after each.

    Raises:
        ConfigError: `taps` are not rising layers of the model, or `folder` holds data that was collected otherwise.
        TrainingError: a shard cannot be written (a full disk, say); those before it stay.
    """
    depth = backend.config.num_hidden_layers
    if list(taps) != sorted(set(taps)) or not all(0 < tap < depth for tap in taps):
        raise ConfigError(f"taps are {list(taps)}; they must be rising layers from 1 to {depth - 1}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("shard-*.safetensors"))[:1]:
        collected = json.loads(shard_metadata(path)["taps"])[:-1]
        taps = collected if set(taps) <= set(collected) else taps
    metadata = {"fingerprint": fingerprint, "taps": json.dumps([*taps, depth])}
    longest = max(map(len, prompts)) + max_new_tokens
    states = _States([*taps, depth], max_num_seqs, longest, backend.config.hidden_size)
    engine = Engine(
        backend, SpeculativeConfig(draft="none"), states, eos_token_ids=eos_token_ids, max_num_seqs=max_num_seqs
    )
    params = SamplingParams(max_new_tokens=max_new_tokens)
    num_tokens = 0
    for first in range(0, len(prompts), SHARD_PROMPTS):
        path = folder / f"shard-{first // SHARD_PROMPTS:05}.safetensors"
        batch = prompts[first : first + SHARD_PROMPTS]
        if path.exists():
            if (found := shard_metadata(path)) != metadata:
                raise ConfigError(f"{path} was collected with {found}, not {metadata}; use another folder")
            continue
        waiting = [engine.add(Request(prompt, params)) for prompt in batch]
        done: dict[int, Conversation] = {}
        while waiting:
            engine.step()
            for sequence in [s for s in waiting if s.is_finished]:
                waiting.remove(sequence)
                prompt, answer = (
                    sequence.token_ids[: sequence.num_prompt_tokens],
                    sequence.token_ids[sequence.num_prompt_tokens :],
                )
                done[sequence.number] = Conversation.of(prompt, answer, states.of(sequence))
                num_tokens += len(sequence.token_ids)
                doing((first + len(done)) / len(prompts))
        # in the order of the prompts, whichever ended first
        write_shard(path, [done[number] for number in sorted(done)], metadata)
        if progress:
            progress(first + len(batch), num_tokens)
