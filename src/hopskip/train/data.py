"""Rows of token ids, packed and padded, in an order that depends on nothing but the data and the seed.

Rows are read, tokenized and packed in the order of the source; the Trainer's own seeded sampler shuffles them anew each
epoch and skips what a resumed run has seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hopskip.errors import ConfigError
from hopskip.train.encode import Document, encode
from hopskip.train.read import DataConfig, is_held_out, read_split, read_wanted

IGNORED = -100
"""The label of a token that is not learned."""

Row = dict[str, Tensor]
"""`input_ids`, `labels`, and for packed documents `position_ids`; int64 [length]."""


class StreamedRows(IterableDataset[Row]):
    """Rows that are made anew each time they are asked for: once over the source, in its order. The workers of a
    DataLoader share its documents among them."""

    def __init__(self, data: DataConfig, tokenizer: Any) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._rank, self._num_ranks = 0, 1
        self._seed: int | None = None

    def endless(self, *, rank: int, num_ranks: int, seed: int) -> StreamedRows:
        """One rank's share, over and over, so that no rank ends before another: each of its documents comes once in
        every pass. With `shuffle_buffer`, every pass and share has an order of its own, from the seed."""
        rows = StreamedRows(self._data, self._tokenizer)
        rows._rank, rows._num_ranks, rows._seed = rank, num_ranks, seed
        return rows

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        index, number = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        share = (self._rank * number + index, self._num_ranks * number)
        if self._seed is None:
            yield from make_rows(self._data, self._tokenizer, held_out=False, share=share)
            return
        for turn in itertools.count():
            rows = make_rows(self._data, self._tokenizer, held_out=False, share=share)
            if self._data.shuffle_buffer is not None:
                rows = _shuffled(rows, self._data.shuffle_buffer, random.Random(f"{self._seed} {turn} {share}"))
            first = next(rows, None)
            if first is None:
                raise ConfigError(
                    f"{share[1]} readers (ranks x training.dataloader_num_workers) share the data, and nothing is left "
                    "for one of them; use fewer, or more documents"
                )
            yield first
            yield from rows


def _shuffled(rows: Iterator[Row], size: int, generator: random.Random) -> Iterator[Row]:
    """Each row drawn from a buffer of the next `size`."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        index = generator.randrange(len(buffer))
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer


def load_rows(data: DataConfig, tokenizer: Any, context: int, *, held_out: bool = False) -> list[Row] | StreamedRows:
    """The training rows, or those to evaluate on; `context` is the most positions that the model takes.

    Raises:
        ConfigError: nothing to read, nothing left, or a document is too long.
    """
    if data.max_length > context:
        raise too_long(data.max_length, context)
    if data.streaming and not held_out:
        if next(make_rows(data, tokenizer, held_out=False), None) is None:
            raise _empty(data, held_out=False)
        return StreamedRows(data, tokenizer)
    rows: list[Row] = []
    for row in make_rows(data, tokenizer, held_out=held_out):
        rows.append(row)
        if held_out and len(rows) == data.max_eval_rows:
            break
    if not rows:
        raise _empty(data, held_out=held_out)
    return rows


def too_long(max_length: int, context: int) -> ConfigError:
    """Rows longer than the model's context."""
    return ConfigError(f"data.max_length is {max_length}, but the model's context is {context}; lower it")


def _empty(data: DataConfig, *, held_out: bool) -> ConfigError:
    limits = f" where {dict(data.where)}" if data.where else ""
    use = "evaluate" if held_out else "train"
    holdout = "; data.holdout_every may leave too few" if data.holdout_every else ""
    sources = data.eval if held_out and data.eval else data.train
    return ConfigError(
        f"no rows to {use} on in {', '.join(sources)}{limits} (those without anything to learn are left out): check "
        f"the path, `where`, and what `too_long` drops{holdout}"
    )


def make_rows(data: DataConfig, tokenizer: Any, *, held_out: bool, share: tuple[int, int] = (0, 1)) -> Iterator[Row]:
    """Read, tokenize, pack; rows without anything to learn are left out.

    Of a source with a single entry, a book say, and `holdout_every`, it is rows that are held out.

    Args:
        share: (index, number): of every `number` entries of the source only the one with that index.
    """
    every = data.holdout_every
    if every is None:
        entries = read_split(data, held_out=held_out)
    else:
        source = read_wanted(data, data.train)
        first = list(itertools.islice(source, 2))
        if len(first) == 1:
            rows = (
                row for index, row in enumerate(_pack(first, data, tokenizer)) if is_held_out(index, every) == held_out
            )
            yield from itertools.islice(rows, share[0], None, share[1])
            return
        numbered = enumerate(itertools.chain(first, source))
        entries = (entry for index, entry in numbered if is_held_out(index, every) == held_out)
    yield from _pack(itertools.islice(entries, share[0], None, share[1]), data, tokenizer)


def _pack(entries: Iterable[Mapping[str, Any]], data: DataConfig, tokenizer: Any) -> Iterator[Row]:
    documents = _fit((document for entry in entries for document in encode(entry, data, tokenizer)), data)
    if data.packing == "none":
        rows: Iterator[Row] = (_row([document]) for document in documents)
    elif data.packing == "blocks":
        rows = _blocks(documents, data.max_length)
    else:
        rows = _bins(documents, data.max_length)
    return (row for row in rows if row["labels"].ne(IGNORED).any())


def _fit(documents: Iterable[Document], data: DataConfig) -> Iterator[Document]:
    """Every document, brought to `max_length` at most (for blocks there is no need)."""
    for document in documents:
        length = len(document.ids)
        if length <= data.max_length or data.packing == "blocks":
            yield document
        elif data.too_long == "truncate":
            yield document[: data.max_length]
        elif data.too_long == "split":
            yield from (document[start : start + data.max_length] for start in range(0, length, data.max_length))
        elif data.too_long == "error":
            raise ConfigError(
                f"a document has {length} tokens, but data.max_length is {data.max_length}; raise it, or say what to "
                "do: data.too_long=truncate, drop or split"
            )


def _blocks(documents: Iterable[Document], length: int) -> Iterator[Row]:
    """One stream, cut every `length` tokens; what is left at the end is a shorter row."""
    ids: list[int] = []
    learned: list[bool] = []
    for document in documents:
        ids += document.ids
        learned += document.learned
        while len(ids) >= length:
            yield _row([Document(ids[:length], learned[:length])])
            del ids[:length], learned[:length]
    if ids:
        yield _row([Document(ids, learned)])


def _bins(documents: Iterable[Document], length: int) -> Iterator[Row]:
    """Whole documents, in order, as many as fit."""
    held: list[Document] = []
    num_held = 0
    for document in documents:
        if held and num_held + len(document.ids) > length:
            yield _row(held, packed=True)
            held, num_held = [], 0
        held.append(document)
        num_held += len(document.ids)
    if held:
        yield _row(held, packed=True)


def _row(documents: Sequence[Document], packed: bool = False) -> Row:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for document in documents:
        ids += document.ids
        # nothing predicts a document's first token
        labels += [
            IGNORED,
            *(i if is_on else IGNORED for i, is_on in zip(document.ids[1:], document.learned[1:], strict=True)),
        ]
        positions += range(len(document.ids))
    row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    return {**row, "position_ids": torch.tensor(positions)} if packed else row


def collate(rows: Sequence[Row]) -> Row:
    """Rows of different lengths, padded on the right, as [B, T]; without a mask, since attention is causal: no token
    sees the padding behind it.

    Packed rows carry positions that start anew with each document, by which transformers keeps the documents apart;
    their padding is a document of its own.
    """
    length = max(len(row["input_ids"]) for row in rows)

    def pad(values: Tensor, value: int) -> Tensor:
        return torch.cat((values, values.new_full((length - len(values),), value)))

    batch = {name: torch.stack([pad(row[name], value) for row in rows]) for name, value in _PADDING if name in rows[0]}
    if "position_ids" in batch:
        for row, positions in zip(rows, batch["position_ids"], strict=True):
            num_padding = length - len(row["input_ids"])
            positions[length - num_padding :] = torch.arange(num_padding)
    return batch


_PADDING = (("input_ids", 0), ("labels", IGNORED), ("position_ids", 0))
