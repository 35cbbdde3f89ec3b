"""A machine with a GPU is no worse than one without: nothing here needs one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hopskip import ConfigError, SpeculativeConfig
from hopskip.backends import gpu
from hopskip.backends.gpu import Gpu, find_gpu
from hopskip.backends.native import isa
from hopskip.backends.rows import Rows, Segment
from hopskip.checkpoint.checkpoint import Checkpoint
from hopskip.checkpoint.stored import BlockType, StoredTensor
from hopskip.loading import LoadConfig, known_device
from hopskip.serve.memory import free_memory
from tests.models import tiny_config, tiny_model

CARD = Gpu(free_bytes=24 * 2**30, bytes_per_second=1e12)


def checkpoint_of(num_layers: int, hidden_size: int, bytes_per_value: float = 2.0) -> Checkpoint:
    """A model of some size, of which nothing is there but the numbers."""
    config = replace(
        tiny_config(), num_hidden_layers=num_layers, hidden_size=hidden_size, intermediate_size=4 * hidden_size
    )
    stored = BlockType("BF16", 1, 2, "bfloat16") if bytes_per_value == 2 else BlockType("Q4_0", 32, 18, None)
    rows = config.num_parameters // 1024
    return Checkpoint(Path("/x"), config, {"w": StoredTensor(Path("/x"), 0, stored, (rows, 1024))}, "")


SMALL, LARGE = checkpoint_of(30, 576), checkpoint_of(32, 4096)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts one into the machine."""
    monkeypatch.setattr(gpu, "num_usable_cores", lambda: 4)
    monkeypatch.setattr(isa, "obstacle", lambda: None)

    def put(is_available: bool = True, free: int = 24 * 2**30, **properties: int) -> None:
        monkeypatch.setattr(gpu, "_DRIVERS", (str(tmp_path),))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))

    return put


def test_without_a_driver_pytorch_is_not_even_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_DRIVERS", ("/nonexistent",))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert find_gpu() is None
    assert known_device("auto") == known_device("cpu") == "cpu"
    monkeypatch.setattr(gpu, "_DRIVERS", ("/",))
    assert find_gpu() is None, "a driver, and no PyTorch"


def test_what_a_card_says_of_itself(card: Callable[..., None]) -> None:
    card(is_available=False)
    assert find_gpu() is None
    card(free=7, memory_clock_rate=9_751_000, memory_bus_width=384)
    found = find_gpu()
    assert found is not None
    assert found.free_bytes == 7
    assert found.bytes_per_second == pytest.approx(936e9, rel=1e-3)
    card(free=7)
    assert find_gpu() == Gpu(free_bytes=7, bytes_per_second=300e9)
    assert known_device("auto") == "cuda"


def test_a_small_model_stays_on_the_cpu_and_a_large_one_goes_where_it_fits(card: Callable[..., None]) -> None:
    card()
    assert LoadConfig().where(SMALL) == ("native", "cpu"), "launches take longer than the CPU's passes"
    assert LoadConfig().where(LARGE) == ("torch", "cuda")
    assert LoadConfig().where() == ("native", "cpu"), "nobody knows the model"
    card(free=8 * 2**30)
    assert LoadConfig().where(LARGE) == ("native", "cpu"), "too large for the card"
    card(is_available=False)
    assert LoadConfig().where(LARGE) == ("native", "cpu")


@pytest.mark.parametrize(
    "options", [{"quantize": "q8"}, {"quantize": "q4"}, {"kv_dtype": "int8"}, {"threads": 2}, {"backend": "native"}]
)
def test_options_of_the_native_engine_keep_it(card: Callable[..., None], options: dict[str, Any]) -> None:
    card()
    assert LoadConfig(**options).where(LARGE) == ("native", "cpu")


@pytest.mark.parametrize("options", [{"draft_precision": "q8"}, {"skip_layers": (3,)}, {"draft": "layer-skip"}])
def test_so_do_drafts_of_the_native_engine(card: Callable[..., None], options: dict[str, Any]) -> None:
    card()
    assert LoadConfig().where(LARGE, SpeculativeConfig(**options)) == ("native", "cpu")
    assert LoadConfig().where(LARGE, SpeculativeConfig(draft="ngram")) == ("torch", "cuda")


def test_what_the_native_engine_cannot_run_goes_to_the_card(
    card: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    card()
    assert LoadConfig(dtype="float16").where(SMALL) == ("torch", "cuda")
    assert LoadConfig(backend="torch").where() == ("torch", "cuda")
    monkeypatch.setattr(isa, "obstacle", lambda: "it was not built")
    assert LoadConfig().where(SMALL) == ("torch", "cuda")
    with pytest.raises(ConfigError, match="quantize=q8 needs the native CPU backend"):
        LoadConfig(quantize="q8").where(SMALL)


def test_the_rule_weighs_bytes_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "num_usable_cores", lambda: 4)
    weights = 2 * LARGE.config.num_parameters
    here = weights / 40e9
    there = 32 * 0.25e-3 + weights / (0.7 * 1e12)
    assert there * 1.5 < here
    assert CARD.is_worth(LARGE, "bfloat16", "auto")
    assert CARD.is_worth(LARGE, "bfloat16", "bfloat16")
    slow = replace(CARD, bytes_per_second=1e9 * weights / 1e9 / (0.7 * (here / 1.45 - 32 * 0.25e-3)))
    assert not slow.is_worth(LARGE, "bfloat16", "auto"), "1.45 x is not enough"
    quick = replace(slow, bytes_per_second=slow.bytes_per_second * 1.1)
    assert quick.is_worth(LARGE, "bfloat16", "auto")
    assert not quick.is_worth(LARGE, "bfloat16", "q4"), "in a quarter of the bytes the CPU is faster"
    stored_in_q4 = checkpoint_of(32, 4096, 18 / 32)
    assert not quick.is_worth(stored_in_q4, "bfloat16", "auto"), "as it is with a file that has so few"
    monkeypatch.setattr(gpu, "num_usable_cores", lambda: 256)
    assert not quick.is_worth(LARGE, "bfloat16", "auto"), "more cores read more"
    full = replace(CARD, free_bytes=int(1.2 * weights) + 2**30)
    assert not replace(full, free_bytes=full.free_bytes - 2**20).is_worth(LARGE, "bfloat16", "auto")


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def info(device: str) -> tuple[int, int]:
        asked.append(device)
        return 123, 456

    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    assert free_memory("cuda:1 (NVIDIA H100)") == 123
    assert asked == ["cuda:1"]
    assert free_memory("cpu") == pytest.approx(free_memory(), rel=0.2) != 123


def test_cudnn_attention_is_off_within_our_calls_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would plan anew for each length. Also when a pass raises, what others set comes back."""
    seen: list[bool] = []
    plain = F.scaled_dot_product_attention

    def spy(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return plain(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model = tiny_model()
    cache = model.new_cache(1, 8)
    for was_enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        try:
            model.forward([1, 2], Rows([Segment(0, 0, 2)]), cache)
            with pytest.raises(AssertionError):
                model.forward([1], Rows([Segment(0, 99, 1)]), cache)
            assert torch.backends.cuda.cudnn_sdp_enabled() is was_enabled  # type: ignore[no-untyped-call]
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
    assert seen
    assert not any(seen)
