"""Static rounds on a GPU: share of its bandwidth, cost of drafts and verify passes, tokens per second by acceptance.

    python benchmarks/gpu.py                      # an H100 or H200, under ten minutes
    python benchmarks/gpu.py --device cpu --tiny  # the same script on shapes of seconds

Models have the shapes of Llama checkpoints and random weights, so nothing is downloaded. Their early exit agrees with
the last layer as often as wanted: what the layers behind the exit add is scaled until the acceptance that a run counts
is near the wanted one. Reported is always the counted one. Bandwidth is what reading a large buffer reaches on the same
device. Progress goes to stderr; the last line of stdout is one JSON object, in which a section that failed or found no
time says so in its place.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from hopskip.config import ModelConfig
from hopskip.draft.config import SpeculativeConfig
from hopskip.evaluate.costs import expected_speedup
from hopskip.evaluate.machine import versions
from hopskip.model import LayerWeights, Transformer, Weights
from hopskip.rope import RopeConfig
from hopskip.static.capture import capture
from hopskip.static.decoder import Generated, StaticDecoder, make_kernels
from hopskip.static.kernels import Kernels
from hopskip.static.matrix import Precision
from hopskip.static.model import num_bytes
from hopskip.stats import SpeculativeStats

PLAIN = SpeculativeConfig(draft="none")
ACCEPTANCES = (0.5, 0.7, 0.9)
MAX_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model to build, and how it is drafted."""

    config: ModelConfig
    exit_layer: int
    num_draft_tokens: int


def llama(exit_layer: int, num_draft_tokens: int, **sizes: Any) -> Shape:
    config = ModelConfig(
        model_type="llama", max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope=RopeConfig(head_dim=sizes["head_dim"], rope_theta=500_000.0), **sizes,
    )  # fmt: skip
    return Shape(config=config, exit_layer=exit_layer, num_draft_tokens=num_draft_tokens)


SHAPES = {
    "llama-3-8b": llama(
        4, 4, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "llama-3.2-1b": llama(
        4, 4, vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    ),
    "llama-2-7b": llama(
        8, 6, vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128, tie_word_embeddings=False,
    ),
}  # fmt: skip


def tiny(shape: Shape) -> Shape:
    """The same proportions in a size for tests."""
    config = replace(
        shape.config, vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=4, head_dim=16,
        num_attention_heads=16, num_key_value_heads=shape.config.num_key_value_heads // 2, rope=RopeConfig(head_dim=16),
    )  # fmt: skip
    return replace(shape, config=config, exit_layer=1)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much to run."""

    repeats: int
    """Timed groups, of which the fastest counts."""
    runs: int
    """Passes in a group."""
    num_prompts: int
    prompt_length: int
    num_tokens: int
    bisections: int


FULL = Effort(repeats=5, runs=20, num_prompts=4, prompt_length=256, num_tokens=192, bisections=8)
SMALL = Effort(repeats=1, runs=1, num_prompts=2, prompt_length=8, num_tokens=24, bisections=4)


class SyntheticModel:
    """Random weights, and a dial for how often the exit agrees with the last layer."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        config = shape.config

        def random(outputs: int, inputs: int, gain: float) -> Tensor:
            weights = torch.randn((outputs, inputs), generator=generator, dtype=dtype, device=device)
            return weights.mul_(gain / math.sqrt(inputs))

        hidden, inner = config.hidden_size, config.intermediate_size
        ones = torch.ones(hidden, dtype=dtype, device=device)
        layers = [
            LayerWeights(
                input_layernorm=ones,
                # sharp attention: text that depends on its past does not end in a short cycle
                qkv_proj=random(config.qkv_size, hidden, 2.0),
                o_proj=random(hidden, config.num_attention_heads * config.head_dim, 0.3),
                post_attention_layernorm=ones,
                gate_up_proj=random(2 * inner, hidden, 1.0),
                down_proj=random(hidden, inner, 0.5),
            )
            for _ in range(config.num_hidden_layers)
        ]
        embed_tokens = random(config.vocab_size, hidden, math.sqrt(hidden))
        # a head of its own in any case: a tied one finds a random token itself the likeliest to follow it
        lm_head = random(config.vocab_size, hidden, 1.0)
        weights = Weights(embed_tokens=embed_tokens, layers=layers, norm=ones, lm_head=lm_head)
        self.model = Transformer(config, weights)
        self._late = [matrix for layer in layers[shape.exit_layer :] for matrix in (layer.o_proj, layer.down_proj)]
        self._gain = 1.0

    def set_gain(self, gain: float) -> None:
        """Scale what the layers behind the exit add to the hidden states; 0 would make the exit always right."""
        for matrix in self._late:
            matrix.mul_(gain / self._gain)
        self._gain = gain


class Measurement:
    """All sections of one model. Each can fail, or come too late, alone.

    Args:
        deadline: of `time.monotonic`; a section that would begin after it is left out.
    """

    def __init__(
        self, name: str, shape: Shape, effort: Effort, device: torch.device, dtype: torch.dtype, kernels: str,
        bandwidth: float, deadline: float,
    ) -> None:  # fmt: skip
        self.found: dict[str, Any] = {}
        self._name, self._shape, self._effort = name, shape, effort
        self._device, self._bandwidth, self._deadline = device, bandwidth, deadline
        self._synthetic = SyntheticModel(shape, dtype, device)
        self._model = self._synthetic.model
        self._gains: dict[float, float] = {}
        self._kernels: Kernels = make_kernels(kernels, self._model)  # type: ignore[arg-type]
        vocab_size = shape.config.vocab_size
        generator = torch.Generator().manual_seed(1)
        self._prompts = [
            torch.randint(vocab_size, (effort.prompt_length,), generator=generator).tolist()
            for _ in range(effort.num_prompts)
        ]

    def run(self, *, tune: bool) -> None:
        if tune:
            self._section("tilings", self._tune)
        self._section("passes", self._passes)
        self._section("rows", self._row_exact)
        for acceptance in ACCEPTANCES:
            self._section(f"acceptance {acceptance}", partial(self._speed, acceptance))
        for precision in get_args(Precision):
            self._section(f"draft in {precision}", partial(self._cheap_draft, precision))
        for precision in get_args(Precision):
            self._section(f"all in {precision}", partial(self._packed, precision))

    def _section(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() > self._deadline:
            self.found[name] = {"skipped": "no time left"}
            return
        started = time.monotonic()
        try:
            with torch.inference_mode():
                self.found[name] = measure()
        except Exception as error:  # the other sections must be told of all the same
            self.found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        gc.collect()  # a decoder and its graph refer to each other
        seconds = time.monotonic() - started
        print(f"{self._name}: {name}: {json.dumps(self.found[name])} ({seconds:.1f} s)", file=sys.stderr, flush=True)

    # -- passes --------------------------------------------------------------------------------------------------------

    def _decoder(self, speculative: SpeculativeConfig, **settings: Any) -> StaticDecoder:
        effort = self._effort
        return StaticDecoder(
            self._model, speculative, kernels=self._kernels, stop_token_ids=[],
            max_model_len=effort.prompt_length + effort.num_tokens, **settings,
        )  # fmt: skip

    def _early_exit(self, **settings: Any) -> StaticDecoder:
        shape = self._shape
        speculative = SpeculativeConfig(
            draft="early-exit", exit_layer=shape.exit_layer, num_draft_tokens=shape.num_draft_tokens
        )
        return self._decoder(speculative, **settings)

    def _milliseconds(self, run: Callable[[], object]) -> float:
        return milliseconds(capture(run, self._device), self._device, self._effort)

    def _pass(self, num_rows: int, precision: Precision | None = None) -> tuple[float, int]:
        """A plain round of some rows behind a prompt's length of context: its time, and the bytes that it reads."""
        decoder = self._decoder(PLAIN, num_rows=num_rows, precision=precision)
        context = self._effort.prompt_length
        decoder.state.position_B.fill_(context)
        decoder.state.limit_B.fill_(context)  # it stands still
        weights = num_bytes(decoder.layers, decoder.head)
        cache = decoder.static.cache
        return self._milliseconds(
            lambda: decoder.round(decoder.state)
        ), weights + cache.nbytes * context // cache.length

    def _passes(self) -> dict[str, Any]:
        by_rows = {}
        for num_rows in range(1, MAX_ROWS + 1):
            by_rows[num_rows], read = self._pass(num_rows)
            if num_rows == 1:
                self._plain_bytes = read
        decoder = self._early_exit()
        decoder.state.position_B.fill_(self._effort.prompt_length)
        draft = self._milliseconds(lambda: decoder.round.draft(decoder.state)) / self._shape.num_draft_tokens
        self._pass_ms, self._draft_ms = by_rows, draft
        assert decoder.draft is not None
        draft_bytes = num_bytes(decoder.layers[: self._shape.exit_layer], decoder.head)
        return {
            "plain_ms": by_rows[1],
            "plain_bytes": self._plain_bytes,
            "plain_share_of_bandwidth": self._share(self._plain_bytes, by_rows[1]),
            "draft_step_ms": draft,
            "draft_step_over_plain": draft / by_rows[1],
            "draft_share_of_bandwidth": self._share(draft_bytes, draft),
            "verify_ms_by_rows": by_rows,
            "verify_over_plain_by_rows": {rows: ms / by_rows[1] for rows, ms in by_rows.items()},
        }

    def _share(self, num_bytes: int, ms: float) -> float:
        return num_bytes / (ms / 1e3) / self._bandwidth

    def _row_exact(self) -> dict[str, Any]:
        """Whether a row's final state keeps its bits when other rows are computed with it."""
        decoder = self._decoder(PLAIN)
        ids_N = torch.tensor(self._prompts[0][:MAX_ROWS], device=self._device)
        position_B = decoder.state.position_B

        def states(num_rows: int) -> Tensor:
            parts = []
            for start in range(0, MAX_ROWS, num_rows):
                embedded = decoder.static.embed(ids_N[start : start + num_rows])
                parts.append(decoder.static.run_layers(embedded, decoder.layers, 0, position_B + start))
            return torch.cat(parts)

        one_by_one = states(1)
        equal = {rows: torch.equal(states(rows), one_by_one) for rows in (2, 4, 8)}
        return {"bits_equal_to_one_by_one": equal, "claimed": self._kernels.row_exact}

    # -- text ----------------------------------------------------------------------------------------------------------

    def _speed(self, wanted: float) -> dict[str, Any]:
        decoder = self._early_exit()
        self._dial(decoder, wanted)
        plain = self._plain_for(decoder)
        result = self._compare(plain, decoder)
        cost = self._draft_ms / self._pass_ms[1]
        result["speedup_by_formula"] = expected_speedup(
            result["acceptance_rate_per_tested_token"], decoder.num_rows - 1, cost
        )
        return {"plain_rows": plain.num_rows, **result}

    def _dial(self, decoder: StaticDecoder, wanted: float) -> None:
        """Find the gain of the late layers at which drafts are accepted as often as wanted, by bisection."""
        low, high = 1e-2, 3.0
        for _ in range(self._effort.bisections):
            middle = math.sqrt(low * high)
            self._synthetic.set_gain(middle)
            if acceptance(decoder.generate(self._prompts, self._effort.num_tokens // 2)) > wanted:
                low = middle
            else:
                high = middle
        self._gains[wanted] = middle

    def _compare(self, plain: StaticDecoder, decoder: StaticDecoder) -> dict[str, Any]:
        """Two runs of each, alternating; the second counts, for the first captures and warms up."""
        for _ in range(2):
            expected = plain.generate(self._prompts, self._effort.num_tokens)
            results = decoder.generate(self._prompts, self._effort.num_tokens)
        rate, plain_rate = speed(results), speed(expected)
        num_drafts = sum(r.stats.num_drafts for r in results)
        return {
            "acceptance_rate_per_tested_token": acceptance(results),
            "mean_acceptance_length": 1 + sum(r.stats.num_accepted_tokens for r in results) / num_drafts,
            "tokens_per_second": rate,
            "plain_tokens_per_second": plain_rate,
            "speedup": rate / plain_rate,
            "same_ids": [r.token_ids for r in results] == [r.token_ids for r in expected],
            "distinct_tokens": len({token for r in results for token in r.token_ids}),
        }

    def _cheap_draft(self, precision: Precision) -> dict[str, Any]:
        """A packed draft before the unpacked model, where the plain draft would be accepted at 0.7."""
        self._synthetic.set_gain(self._gains[0.7])
        decoder = self._early_exit(draft_precision=precision)
        return self._compare(self._plain_for(decoder), decoder)

    def _plain_for(self, decoder: StaticDecoder) -> StaticDecoder:
        """Plain decoding of the same text: at the shape of a verify pass, where a row's bits depend on the shape."""
        return self._decoder(PLAIN, num_rows=1 if self._kernels.row_exact else decoder.num_rows)

    def _packed(self, precision: Precision) -> dict[str, Any]:
        one, read = self._pass(1, precision)
        six, _ = self._pass(6, precision)
        return {
            "plain_ms": one,
            "plain_bytes": read,
            "plain_share_of_bandwidth": self._share(read, one),
            "verify_6_over_plain": six / one,
        }

    def _tune(self) -> dict[str, Any]:
        """The fastest tiling of each matrix by timing; used from then on. Packed formats keep their defaults."""
        from hopskip.static.matrix import Matrix
        from hopskip.static.triton_kernels import Epilogue, TritonKernels, candidate_tilings, default_tiling

        assert isinstance(self._kernels, TritonKernels)
        kernels, decoder = self._kernels, self._decoder(PLAIN)
        ones = self._model.weights.norm
        kinds: dict[str, tuple[list[Matrix], Epilogue]] = {
            "qkv": ([layer.qkv for layer in decoder.layers], "plain"),
            "o": ([layer.o for layer in decoder.layers], "plain"),
            "gate_up": ([layer.gate_up for layer in decoder.layers], "gated"),
            "down": ([layer.down for layer in decoder.layers], "plain"),
            "head": ([decoder.head], "best"),
        }
        found = {}
        for kind, (matrices, epilogue) in kinds.items():
            x = torch.ones((MAX_ROWS - 2, matrices[0].shape[1]), dtype=ones.dtype, device=self._device)
            residual = x.new_zeros((len(x), matrices[0].shape[0])) if kind in ("o", "down") else None

            def run(
                matrices: list[Matrix] = matrices,
                epilogue: Epilogue = epilogue,
                x: Tensor = x,
                residual: Tensor | None = residual,
            ) -> None:
                # one layer's after the other, so that none is still in a cache
                for matrix in matrices:
                    if epilogue == "gated":
                        kernels.gated(x, matrix, ones)
                    elif epilogue == "best":
                        kernels.best(x, matrix, ones)
                    else:
                        kernels.linear(x, matrix, norm=ones if residual is None else None, residual=residual)

            key = (*matrices[0].shape, matrices[0].values.dtype, epilogue)
            seconds = {}
            for tiling in dict.fromkeys((default_tiling(matrices[0]), *candidate_tilings(matrices[0]))):
                kernels.tilings[key] = tiling
                seconds[tiling] = self._milliseconds(run) / len(matrices)
            best = min(seconds, key=lambda tiling: seconds[tiling])
            kernels.tilings[key] = best
            found[kind] = {
                "best": str(best),
                "share_of_bandwidth": self._share(matrices[0].nbytes, seconds[best]),
                "us": {str(tiling): 1e3 * ms for tiling, ms in seconds.items()},
            }
        return found


def milliseconds(run: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """Time of one run among many that follow each other; the fastest group of several, after one that warms up."""
    times = []
    for _ in range(effort.repeats + 1):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(effort.runs):
                run()
            stop.record()
            stop.synchronize()
            times.append(float(start.elapsed_time(stop)) / effort.runs)
        else:
            started = time.perf_counter()
            for _ in range(effort.runs):
                run()
            times.append((time.perf_counter() - started) * 1e3 / effort.runs)
    return min(times[1:])


def read_bandwidth(device: torch.device, num_bytes: int, effort: Effort) -> float:
    """Bytes per second that a reduction over a large buffer reads."""
    buffer = torch.ones(num_bytes // 4, device=device)
    runs: list[Callable[[], object]] = [buffer.sum, buffer.amax]
    return buffer.nbytes / min(milliseconds(run, device, effort) / 1e3 for run in runs)


def speed(results: list[Generated]) -> float:
    """Tokens after the first per second of decoding."""
    return sum(r.stats.num_tokens - 1 for r in results) / sum(r.stats.decode_seconds for r in results)


def acceptance(results: list[Generated]) -> float:
    """Share of the draft tokens that were accepted among those that were looked at: a round ends at the first that is
    not, and says nothing of those behind it."""

    def num_tested(stats: SpeculativeStats) -> int:
        return stats.num_drafts + sum(stats.num_accepted_tokens_per_pos[:-1])

    return sum(r.stats.num_accepted_tokens for r in results) / sum(num_tested(r.stats) for r in results)


def aims(models: dict[str, Any]) -> dict[str, Any]:
    """What Llama-3-8B in bfloat16 should reach on an H100, beside what it did; None where it was not measured."""
    found = models.get("llama-3-8b", {})
    passes, drafted = found.get("passes", {}), found.get("acceptance 0.7", {})
    return {
        "plain share of bandwidth >= 0.85": passes.get("plain_share_of_bandwidth"),
        "verify of 6 <= 1.1 x plain": passes.get("verify_over_plain_by_rows", {}).get(6),
        "speedup at acceptance 0.7 >= 2.2": drafted.get("speedup"),
        "tokens per second at acceptance 0.7 >= 300": drafted.get("tokens_per_second"),
    }


@contextmanager
def freed(device: torch.device) -> Iterator[None]:
    """Give a model's memory back after it."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    effort, dtype = (SMALL, torch.float32) if arguments.tiny else (FULL, torch.bfloat16)
    is_gpu = device.type == "cuda"
    bandwidth = read_bandwidth(device, 1 << 26 if arguments.tiny else 1 << 32, effort)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
        "versions": {**versions(), "cuda": torch.version.cuda},
        "dtype": str(dtype),
        "kernels": arguments.kernels,
        "read_bytes_per_second": bandwidth,
        "prompt_length": effort.prompt_length,
        "num_tokens": effort.num_tokens,
        "models": {},
    }
    deadline = time.monotonic() + arguments.budget
    for name in arguments.models:
        started = time.monotonic()
        shape = tiny(SHAPES[name]) if arguments.tiny else SHAPES[name]
        with freed(device):
            try:
                measurement = Measurement(name, shape, effort, device, dtype, arguments.kernels, bandwidth, deadline)
                report["models"][name] = measurement.found
                measurement.run(tune=is_gpu and arguments.kernels != "torch")
            except Exception as error:  # a model that does not fit must not cost the others
                report["models"].setdefault(name, {})["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            measurement = None  # type: ignore[assignment]
        report["models"][name]["seconds"] = time.monotonic() - started
    report["aims"] = aims(report["models"])
    return report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of the same proportions for a test, in float32")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--kernels", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all; no section begins later")
    print(json.dumps(measure(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
