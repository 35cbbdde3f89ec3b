"""CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph that replays what it did to its tensors; on other devices `run` itself.

    It is run a few times first, so that kernels are compiled and workspaces allocated; what that changes stays changed.
    """
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph.replay
