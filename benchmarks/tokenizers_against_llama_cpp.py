r"""Token ids of GGUF files: hopskip's against llama.cpp's, for every pre-tokenizer that llama.cpp names.

    python -m benchmarks.tokenizers_against_llama_cpp
    python -m benchmarks.tokenizers_against_llama_cpp --texts 1500 --expected tests/data/llama_cpp_ids.json.xz

Vocabularies are trained here, on text made up here: a byte-level one, whose merges cross every kind of boundary that a
splitter could draw, and one of SentencePiece's kind (with the `sentencepiece` package). From each, vocabulary-only GGUF
files are written for every name and setting, and each text is encoded by both sides. Needs llama-cpp-python and
sentencepiece; nothing is loaded from anywhere. `--expected` writes ids for the tests, which then need neither.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import lzma
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tests.models import tiny_config
from tokenizers import models, pre_tokenizers, trainers

from benchmarks.odd_texts import make_texts
from hopskip.checkpoint.gguf import GGUFFile
from hopskip.text.gguf_tokenizer import tokenizer_of_gguf
from hopskip.text.pre_tokenizers import PRE_TOKENIZERS

BYTE_LEVEL_SPECIAL = {"<|bos|>": 3, "<|eos|>": 3, "<|im_end|>": 1, "<|user|>": 4, "<unk>": 2, "éß": 4}
"""Added tokens and their types in the file."""

SPECIAL_IN_TEXTS = (*BYTE_LEVEL_SPECIAL, "<s>", "</s>", "<|endoftext|>", "two words", "<é>")

# -- vocabularies ------------------------------------------------------------------------------------------------------


def byte_level_tables(size: int, texts: Seq[str]) -> dict[str, Any]:
    """Trained without a splitter but spaces, so that merges cross boundaries of every kind."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\S+\s*|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*tokens, *BYTE_LEVEL_SPECIAL],
        "tokenizer.ggml.token_type": [*[1] * len(tokens), *BYTE_LEVEL_SPECIAL.values()],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }


def sentencepiece_tables(size: int, texts: Seq[str]) -> dict[str, Any]:
    """As llama.cpp's converter writes a `tokenizer.model`."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [line for text in texts for line in text.split("\n") if line.strip() and "\0" not in line]
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["<|user|>", "▁▁▁▁▁▁▁▁▁"],
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.vocab_size())
    user = {processor.piece_to_id(piece) for piece in ("<|user|>", "▁▁▁▁▁▁▁▁▁")}
    kinds = [
        2
        if processor.is_unknown(i)
        else 3
        if processor.is_control(i)
        else 6
        if processor.is_byte(i)
        else 4
        if i in user
        else 1
        for i in ids
    ]
    added = {"<|im_end|>": 3, "<|endoftext|>": 3, "two words": 4, "<é>": 4}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*map(processor.id_to_piece, ids), *added],
        "tokenizer.ggml.scores": [*map(processor.get_score, ids), *[-1000.0] * len(added)],
        "tokenizer.ggml.token_type": [*kinds, *added.values()],
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }


def variants(byte_level: Mapping[str, Any], pieces: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file that is compared: its name, and its metadata."""
    for name in PRE_TOKENIZERS:
        yield name, {**byte_level, "tokenizer.ggml.pre": name}
    around = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    yield "qwen2, BOS and EOS", {**byte_level, "tokenizer.ggml.pre": "qwen2", **around}
    yield "llama-bpe, no BOS", {**byte_level, "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}
    yield "sentencepiece", dict(pieces)
    yield "sentencepiece, no space prefix", {**pieces, "tokenizer.ggml.add_space_prefix": False, **around}
    yield "sentencepiece, extra whitespace removed", {**pieces, "tokenizer.ggml.remove_extra_whitespaces": True}
    size = len(pieces["tokenizer.ggml.tokens"])
    scores = pieces["tokenizer.ggml.scores"]
    extended = [0.0 if index > size * 2 // 3 else score for index, score in enumerate(scores)]
    yield "sentencepiece, many pieces of one score", {**pieces, "tokenizer.ggml.scores": extended}
    yield "sentencepiece, all pieces of one score", {**pieces, "tokenizer.ggml.scores": [-1000.0] * size}
    backwards = [-score if score > -1000 else score for score in scores]
    yield "sentencepiece, scores turned round", {**pieces, "tokenizer.ggml.scores": backwards}
    ids = {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.unknown_token_id"}
    yield "sentencepiece, ids left unsaid", {key: value for key, value in pieces.items() if key not in ids}
    yield "sentencepiece, Phi-3 by name", {**pieces, "general.name": "Phi-3 mini"}


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> None:
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"llama.block_count": 1, **metadata}.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- comparing ---------------------------------------------------------------------------------------------------------


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
"""llama.cpp's log, thrown away; it must outlive the calls."""


def ids_of_llama_cpp(path: Path, texts: Seq[str]) -> list[list[int]]:
    import llama_cpp

    llama_cpp.llama_log_set(_SILENT, None)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def ids_of_hopskip(path: Path, texts: Seq[str]) -> list[list[int]]:
    tokenizer = tokenizer_of_gguf(path, GGUFFile(path).metadata, tiny_config())
    return [tokenizer.encode(text) for text in texts]


def choose(texts: Seq[str], ids: Mapping[str, Seq[Seq[int]]], count: int) -> list[int]:
    """Indices of `count` texts that tell files apart, and of more where two files need one to be told apart."""
    short = [index for index, text in enumerate(texts) if len(text) <= 120]
    num_distinct = {i: len({tuple(of_file[i]) for of_file in ids.values()}) for i in short}
    chosen = sorted(short, key=lambda i: (-num_distinct[i], len(texts[i])))[: count // 2]
    chosen += random.Random(0).sample([i for i in short if i not in chosen], count - len(chosen))
    for one, other in combinations(ids.values(), 2):
        if all(one[i] == other[i] for i in chosen):
            chosen += sorted((i for i in short if one[i] != other[i]), key=lambda i: len(texts[i]))[:1]
    return sorted(chosen)


def write_expected(
    path: Path, tables: Seq[Mapping[str, Any]], texts: Seq[str], ids: Mapping[str, Seq[Seq[int]]]
) -> None:
    """What the tests read: the two vocabularies, texts, and for each text the different answers and who gives which."""
    chosen = choose(texts, ids, 360)
    rows = []
    for index in chosen:
        answers = list(dict.fromkeys(tuple(of_file[index]) for of_file in ids.values()))
        rows.append([answers, [answers.index(tuple(of_file[index])) for of_file in ids.values()]])
    expected = {"tables": tables, "files": list(ids), "texts": [texts[i] for i in chosen], "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--texts", type=int, default=4500, help="texts to compare, with each file")
    parser.add_argument("--vocabulary", type=int, default=4000, help="tokens to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", help="the files whose name contains this")
    parser.add_argument("--show", type=int, default=5, help="differences to show for each file")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="write some of llama.cpp's ids, for the tests")
    arguments = parser.parse_args()
    corpus = make_texts(6000, seed=arguments.seed + 1, special=())
    tables = byte_level_tables(arguments.vocabulary, corpus), sentencepiece_tables(arguments.vocabulary, corpus)
    texts = make_texts(arguments.texts, arguments.seed, SPECIAL_IN_TEXTS)
    num_files = num_different = 0
    kept: dict[str, list[list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, metadata in variants(*tables):
            if arguments.only and arguments.only not in name:
                continue
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(path, metadata)
            theirs, ours = ids_of_llama_cpp(path, texts), ids_of_hopskip(path, texts)
            wrong = [index for index in range(len(texts)) if theirs[index] != ours[index]]
            num_files += 1
            num_different += len(wrong)
            print(f"{name}: {len(wrong)} of {len(texts)} texts differ", flush=True)
            show(metadata["tokenizer.ggml.tokens"], texts, theirs, ours, wrong[: arguments.show])
            if arguments.expected:
                kept[name] = theirs
    if arguments.expected:
        write_expected(arguments.expected, tables, texts, kept)
    print(json.dumps({"files": num_files, "texts": len(texts), "different": num_different}))
    sys.exit(1 if num_different else 0)


def show(tokens: Seq[str], texts: Seq[str], theirs: Seq[Seq[int]], ours: Seq[Seq[int]], wrong: Seq[int]) -> None:
    for index in wrong:
        print(f"    {texts[index]!r}")
        print(f"        llama.cpp {[tokens[i] for i in theirs[index]]}")
        print(f"        hopskip   {[tokens[i] for i in ours[index]]}")


if __name__ == "__main__":
    main()
