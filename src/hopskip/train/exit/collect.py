"""Training data for an exit, collected once and read for many epochs.

A shard holds a fixed range of the chats, so an interrupted collection goes on with the first shard that is missing, and
several processes each make shards of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import TypeVar

from hopskip.errors import ConfigError
from hopskip.train.exit.conversations import Conversation, joined, shard_metadata, write_shard

SHARD_CHATS = 256
T = TypeVar("T")
Converse = Callable[[Seq[T], Callable[[int], None]], list[list[Conversation]]]
"""From chats, and who is told how many of them are done, to the turns of each, with the states of the tapped layers if
they are to be stored."""


def collect(
    chats: Seq[T],
    folder: Path,
    converse: Callable[[Seq[int]], Converse[T]],
    *,
    fingerprint: str,
    taps: Seq[int],
    depth: int,
    process: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
    doing: Callable[[float], None] = lambda share: None,
) -> None:
    """Turn chats into conversations, and write them to `folder`.

    Args:
        converse: from the taps to what makes the conversations; asked for when the first shard is missing.
        fingerprint: of the model's weights; noted, so that no exit is trained on another model's states.
        taps: layers after which hidden states are kept, rising. A folder that has more goes on with its own. Empty:
            none are kept.
        depth: layers of the model.
        process: number of this process, and how many there are.
        progress: told the chats done and the tokens collected so far, after each shard.
        doing: told the share of the chats that are done.

    Raises:
        ConfigError: `taps` are not rising layers of the model, or `folder` holds data that was collected otherwise.
        TrainingError: a shard cannot be written (a full disk, say); those before it stay.
    """
    if list(taps) != sorted(set(taps)) or not all(0 < tap <= depth for tap in taps):
        raise ConfigError(f"taps are {list(taps)}; they must be rising layers from 1 to {depth}")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(taps)
    for path in sorted(folder.glob("shard-*.safetensors"))[:1]:
        collected = json.loads(shard_metadata(path)["taps"])
        wanted = collected if wanted and set(wanted) <= set(collected) else wanted
    metadata = {"fingerprint": fingerprint, "taps": json.dumps(wanted)}
    rank, world = process
    make: Converse[T] | None = None
    num_tokens = 0
    for first in range(rank * SHARD_CHATS, len(chats), world * SHARD_CHATS):
        path = folder / f"shard-{first // SHARD_CHATS:05}.safetensors"
        batch = chats[first : first + SHARD_CHATS]
        if path.exists():
            if (found := shard_metadata(path)) != metadata:
                raise ConfigError(f"{path} was collected with {found}, not {metadata}; use another folder")
            continue
        make = make or converse(wanted)
        turns = make(batch, partial(_tell, doing, first, len(chats)))
        conversations = [conversation for each in turns for conversation in joined(each)]
        write_shard(path, conversations, metadata)
        num_tokens += sum(len(c.ids_T) for c in conversations)
        if progress:
            progress(first + len(batch), num_tokens)


def _tell(doing: Callable[[float], None], first: int, num_chats: int, number: int) -> None:
    doing((first + number) / num_chats)
