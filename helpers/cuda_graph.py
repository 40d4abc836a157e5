"""A training step as a GPU does it quickly: recorded once and then replayed (a CUDA graph)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Replayed:
    """A step is more than a thousand short calls, and to make them takes the CPU longer than the
    GPU needs to do them. A recording holds for batches of one shape; the first few steps of each
    are done call by call, in which libraries choose their kernels.

    Args:
        step: takes tensors on the GPU and gives a tuple of them; what it changes stays in place.
        network: that of the step.
    """

    CALL_BY_CALL = 3

    def __init__(self, step: Callable[..., tuple[Tensor, ...]], network: nn.Module) -> None:
        self.step, self.network = step, network
        self.stream = torch.cuda.Stream()  # the usual one cannot be recorded
        self.calls: Counter[tuple] = Counter()
        self.recordings: dict[tuple, tuple] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        kind = tuple(x.shape for x in inputs)
        self.calls[kind] += 1
        if self.calls[kind] <= self.CALL_BY_CALL:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.step(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if kind not in self.recordings:
            self.network.zero_grad()  # gradients get a place of their own in the recording
            own = [x.clone() for x in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.recordings[kind] = graph, own, self.step(*own)
        graph, own, outputs = self.recordings[kind]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)
