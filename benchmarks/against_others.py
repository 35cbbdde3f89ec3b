"""Plain decoding and prefill against llama.cpp and transformers, on this machine, with what the project asks of itself
(floor, aim) beside each figure.

    python -m benchmarks.against_others                      # everything: about a quarter of an hour on two cores
    python -m benchmarks.against_others --only prefill,llama-1b --repeats 1

Contenders take turns, each in a process of its own, with the same token ids and threads; ratios are medians over
prompts, rates medians over repeats. Needs llama-cpp-python (built for this processor, or the comparison is unfair) and
the `eval` extra. Files it makes go to a temporary folder: the default model as Q8_0 and Q4_0, and a Q8_0 file of
Llama-3.2-1B's shape with random weights, on which speed does not depend. The last thing printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.requantize import requantize
from hopskip.bench.contenders import Contender, Hopskip, LlamaCpp, Transformers
from hopskip.bench.machine import describe_machine, measure_read_bandwidth, versions
from hopskip.bench.measure import Result, is_quoted, measure, ratio
from hopskip.checkpoint.checkpoint import expected_tensors, open_checkpoint
from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.rope import RopeConfig
from hopskip.errors import HopskipError
from hopskip.loading import DType, LoadConfig
from hopskip.machine import num_usable_cores
from hopskip.prompts import Prompt, load_prompts, whole_prompts
from hopskip.speculative import SpeculativeConfig
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer

DECODE, PREFILL = "decode_tokens_per_second", "prefill_tokens_per_second"
PLAIN = SpeculativeConfig(draft="none")
SHORT, LONG = 100, 7000  # tokens of context
PREFILL_TOKENS = 512
LLAMA_1B = ModelConfig(
    model_type="llama", vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope=RopeConfig(head_dim=64, rope_theta=500_000.0), tie_word_embeddings=True,
)  # fmt: skip
"""Llama-3.2-1B but for its RoPE scaling, which costs nothing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure beside what is asked of it."""

    measure: str
    value: float | None
    """None if a contender is absent or failed; `reason` says why."""
    floor: float
    aim: float
    at_most: bool = False
    """Smaller is better."""
    reason: str | None = None
    tokens_per_second: dict[str, float | None]
    """The rates behind it, by contender: medians over the prompts."""

    @property
    def passes(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.floor if self.at_most else self.value >= self.floor


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all sections share."""

    model: Path
    folder: Path
    """For the files made here."""
    tokenizer: Tokenizer
    num_tokens: int
    repeats: int
    threads: int

    def requantized(self, kind: str) -> Path:
        path = self.folder / f"{kind}.gguf"
        if not path.exists():
            requantize(self.model, path, kind)
        return path

    def prompt(self, num_tokens: int) -> tuple[Prompt, list[int]]:
        """The first tokens of all prompts, one after the other."""
        ids = self.tokenizer.encode("\n\n".join(whole_prompts()))
        return Prompt("text", f"{num_tokens} tokens", ""), ids[:num_tokens]

    def run(self, contenders: list[Contender], prompts: list[tuple[Prompt, list[int]]]) -> dict[str, Result]:
        def on_step(name: str) -> None:
            print(f"\r{name:40}", end="", file=sys.stderr, flush=True)

        found = measure(
            contenders,
            prompts,
            num_tokens=self.num_tokens,
            repeats=self.repeats,
            threads=self.threads,
            on_step=on_step if sys.stderr.isatty() else lambda name: None,
        )
        return {result.name: result for result in found}


def decode(setup: Setup) -> Iterator[Row]:
    """Short prompts, the default model in several precisions."""
    q8_0, q4_0 = setup.requantized("q8_0"), setup.requantized("q4_0")
    prompts = [(p, p.encode(setup.tokenizer)) for name in ("alpaca", "gsm8k") for p in load_prompts(name, 3)]
    found = setup.run(
        [
            ours("bf16", setup.model, "bfloat16"),
            *(
                Transformers(name=f"transformers-{name}", variant_of="transformers", path=setup.model, dtype=dtype)
                for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
            ),
            ours("q8", q8_0),
            theirs("Q8_0", q8_0),
            ours("default file", setup.model),
            theirs("default file", setup.model),
            theirs("Q4_0", q4_0),
        ],
        prompts,
    )
    quoted = [r for r in found.values() if r.contender.variant_of and is_quoted(r, list(found.values()))]
    transformers = next((r for r in quoted if r.per_prompt), found["transformers-fp32"])
    yield compare("plain bf16 against transformers", found["hopskip bf16"], transformers, DECODE, 2.5, 3.0)
    yield compare("plain q8 against llama.cpp Q8_0", found["hopskip q8"], found["llama.cpp Q8_0"], DECODE, 1.4, 1.9)
    default = found["hopskip default file"]
    yield compare("default file against llama.cpp on it", default, found["llama.cpp default file"], DECODE, 1.3, 2.0)
    yield compare("default file against llama.cpp on Q4_0", default, found["llama.cpp Q4_0"], DECODE, 1.0, 1.5)


def prefill(setup: Setup) -> Iterator[Row]:
    q8_0 = setup.requantized("q8_0")
    found = setup.run([ours("q8", q8_0), theirs("Q8_0", q8_0)], [setup.prompt(PREFILL_TOKENS)])
    name = f"prefill of {PREFILL_TOKENS} tokens, q8 against llama.cpp Q8_0"
    yield compare(name, found["hopskip q8"], found["llama.cpp Q8_0"], PREFILL, 0.9, 1.5)


def context(setup: Setup) -> Iterator[Row]:
    """Time per token after a long text over time per token after a short one; llama.cpp's for comparison."""
    q8_0 = setup.requantized("q8_0")
    prompts = [setup.prompt(SHORT), setup.prompt(LONG)]
    for result in setup.run([ours("q8", q8_0), theirs("Q8_0", q8_0)], prompts).values():
        rates = [p.decode_tokens_per_second for p in result.per_prompt]
        yield Row(
            measure=f"{result.name}: {LONG} tokens of context over {SHORT}",
            value=rates[0] / rates[1] if rates else None,
            floor=2.5,
            aim=1.8,
            at_most=True,
            reason=result.reason,
            tokens_per_second=dict(zip((f"{SHORT}", f"{LONG}"), rates, strict=False)),
        )


def llama_1b(setup: Setup) -> Iterator[Row]:
    path = setup.folder / "llama-1b-q8_0.gguf"
    write_random_q8_0(path, LLAMA_1B)
    found = setup.run([ours("q8", path), theirs("Q8_0", path)], [setup.prompt(SHORT)])
    us, them = found["hopskip q8"], found["llama.cpp Q8_0"]
    yield compare("Llama-3.2-1B shape, q8 against llama.cpp Q8_0", us, them, DECODE, 1.1, 1.3)


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "decode": decode,
    "prefill": prefill,
    "context": context,
    "llama-1b": llama_1b,
}


def ours(what: str, path: Path, dtype: DType = "auto") -> Hopskip:
    return Hopskip(name=f"hopskip {what}", load=LoadConfig(model=path, dtype=dtype, device="cpu"), speculative=PLAIN)


def theirs(what: str, path: Path) -> LlamaCpp:
    return LlamaCpp(name=f"llama.cpp {what}", path=path)


def compare(name: str, us: Result, them: Result, field: str, floor: float, aim: float) -> Row:
    """Our rate over theirs."""
    return Row(
        measure=name,
        value=ratio(us, them, field),
        floor=floor,
        aim=aim,
        reason="; ".join(f"{r.name} is {r.status}: {r.reason}" for r in (us, them) if r.reason) or None,
        tokens_per_second={r.name: r.middle(field) for r in (us, them)},
    )


def write_random_q8_0(path: Path, config: ModelConfig, seed: int = 0) -> None:
    """A GGUF file of random Q8_0 matrices and a made-up vocabulary, for the llama architecture: speed is all it has.

    Matrices of one shape are copies of each other; in memory each has a place of its own, so that all are streamed.
    """
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    matrices: dict[tuple[int, ...], np.ndarray] = {}
    for name, shape in expected_tensors(config).items():
        own_name = names.get_name(name, try_suffixes=(".weight",))
        if len(shape) == 1:
            writer.add_tensor(own_name, np.ones(shape, np.float32))
            continue
        if shape not in matrices:
            rows, columns = shape
            blocks = random.integers(-127, 128, (rows, columns // 32, 34), np.int8).view(np.uint8)
            scale = np.float16(columns**-0.5 / 73)  # 73 is the deviation of the integers
            blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
            matrices[shape] = blocks.reshape(rows, -1)
        writer.add_tensor(own_name, matrices[shape], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A byte-level one whose tokens are the bytes, one merge, and names that no text has."""
    letters = sorted(ByteLevel.alphabet())
    named = [f"<{index}>" for index in range(size - len(letters) - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*letters, letters[0] * 2, *named])
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(letters) + 1) + [gguf.TokenType.UNUSED] * len(named))
    writer.add_token_merges([f"{letters[0]} {letters[0]}"])


def show(row: Row) -> str:
    sign = "<=" if row.at_most else ">="
    if row.value is None:
        return f"{row.measure:60} not measured: {row.reason}"
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in row.tokens_per_second.items() if rate is not None)
    verdict = "ok" if row.passes else "MISSED"
    return (
        f"{row.measure:60} {row.value:5.2f} x  {verdict:6} (floor {sign} {row.floor}, aim {row.aim}; tokens/s: {rates})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file, in place of the default model")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}, with commas between")
    parser.add_argument("--num-tokens", type=int, default=64, help="tokens to generate per run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--only has {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    if arguments.num_tokens < 2 or arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--num-tokens must be at least 2, --repeats and --threads at least 1")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HOPSKIP_CACHE"] = str(folder / "packed")  # files of one run are not worth keeping
        try:
            model = arguments.model or find_model()
            checkpoint = open_checkpoint(model)
            tokenizer = load_tokenizer(model, checkpoint.config)
            setup = Setup(
                model=model,
                folder=folder,
                tokenizer=tokenizer,
                num_tokens=arguments.num_tokens,
                repeats=arguments.repeats,
                threads=arguments.threads,
            )
            bandwidth = measure_read_bandwidth(arguments.threads)
            for section in chosen:
                for row in SECTIONS[section](setup):
                    rows.append(row)
                    print(show(row), flush=True)
        except HopskipError as error:
            print(f"against_others: error: {error}", file=sys.stderr)
            return 2
    bandwidth = max(bandwidth, measure_read_bandwidth(arguments.threads))
    report = {
        "machine": describe_machine(arguments.threads, bandwidth),
        "versions": versions(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "rows": [{**asdict(row), "passes": row.passes} for row in rows],
    }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
