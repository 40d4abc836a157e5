"""The sheet's network: input-weighted convolution blocks, and what stands between them.

An image travels through `WhiteningStem` → `IntermediateBlock` (K times, each followed by pooling,
normalisation and activation) → `OutputBlock` → logits. The letters are the sheet's: x is a block's
input, m the mean of each of its channels, a = [a1 … aL] the weights that a fully connected layer
computes from m, and C1 … CL the branches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import mixing

GATES = ("linear", "softmax", "sigmoid", "constant", "uniform")
IMPLEMENTATIONS = ("auto", "reference", "mixed")
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class IntermediateBlock(nn.Module):
    """x′ = a1·C1(x) + … + aL·CL(x), where a = fc(m) and m holds the channel means of x.

    Args:
        in_channels, out_channels: channels c of x and c′ of x′.
        kernels: the odd kernel size of each of the L branches.
        stride: of every branch.
        gate: `"linear"` is the sheet's a, fc(m) itself; `"softmax"` (Dynamic Convolution,
            arXiv 1912.03458) and `"sigmoid"` (CondConv, arXiv 1904.04971) of it. To compare with,
            `"constant"` learns one a for all images and `"uniform"` is 1/L.
        bias: of the branches; pointless where batch normalisation follows.
        implementation: `"reference"` is the formula; `"mixed"` hands (x, a, kernels) to the C++
            extension, which evaluates the same function as (Σ aₗWₗ)∗x; `"auto"` lets
            `mixing.is_faster` decide. It may be set afterwards.

    Raises:
        ValueError: an argument that is not allowed; when called, an x that is not b×c×h×w.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernels: Sequence[int] = (3, 1), stride: int = 1,
        gate: str = "linear", bias: bool = True, implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "stride": stride}
        for name, value in counts.items():
            _check(type(value) is int and value > 0, name, value, "an integer of at least 1")
        odd = [type(k) is int and k > 0 and k % 2 == 1 for k in kernels]
        _check(odd and all(odd), "kernels", kernels, "an odd size for each branch, such as [3, 1]")
        _check(gate in GATES, "gate", gate, ", ".join(GATES))
        known = implementation in IMPLEMENTATIONS
        _check(known, "implementation", implementation, ", ".join(IMPLEMENTATIONS))
        self.gate_kind, self.stride, self.implementation = gate, stride, implementation
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, k, stride, padding=k // 2, bias=bias)
            for k in kernels
        )
        self.fc = nn.Linear(in_channels, len(kernels))
        self.start_uniform()

    def forward(self, x: Tensor) -> Tensor:
        a = self.gate(x)  # b×L
        if self.is_mixed(x):
            biases = None if self.branches[0].bias is None else [C.bias for C in self.branches]
            return mixing.mixed_convolution(x, a, [C.weight for C in self.branches], biases)
        maps = [C(x) for C in self.branches]  # L of b×c′×⌈h/stride⌉×⌈w/stride⌉
        a = a.to(maps[0].dtype)[:, :, None, None, None]  # b×L×1×1×1
        return reduce(torch.add, (a[:, l] * y for l, y in enumerate(maps)))

    def gate(self, x: Tensor) -> Tensor:
        """The weights a, b×L, of the branches for each image of x, b×c×h×w."""
        _check_images(x, self.fc.in_features)
        if self.gate_kind in ("constant", "uniform"):
            return self.fc.bias.expand(len(x), -1)
        a = self.fc(channel_means(x))  # b×c → b×L
        if self.gate_kind == "softmax":
            return a.softmax(dim=1)
        return a.sigmoid() if self.gate_kind == "sigmoid" else a

    def start_uniform(self) -> None:
        """Let every a start at 1/L (a single sigmoid's at 1/2): the branches differ by their random
        kernels, not by a. A linear a with random weights would have a random sign at first."""
        L = len(self.branches)
        start = {"softmax": 0.0, "sigmoid": -math.log(max(L - 1, 1))}
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, start.get(self.gate_kind, 1 / L))
        self.fc.weight.requires_grad_(self.gate_kind not in ("constant", "uniform"))
        self.fc.bias.requires_grad_(self.gate_kind != "uniform")

    def is_mixed(self, x: Tensor) -> bool:
        """Whether the C++ extension evaluates the sum for this x."""
        if self.implementation == "auto":
            return mixing.is_faster(x, [C.weight for C in self.branches], self.stride)
        mixed = self.implementation == "mixed"
        _check(self.stride == 1 or not mixed, "stride", self.stride, "1 with the C++ extension")
        return mixed


class OutputBlock(nn.Module):
    """The channel means m of x, b×c×h×w, through a fully connected layer to logits, b×classes."""

    def __init__(self, in_channels: int, classes: int = 10) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(channel_means(x))  # b×c → b×classes


def channel_means(x: Tensor) -> Tensor:
    """The mean m of each channel of x: b×c from b×c×h×w."""
    return x.sum(dim=(2, 3)) / x.shape[2:].numel()  # x.mean is slower in channels-last memory


class WhiteningStem(nn.Module):
    """A fixed 3×3 convolution that decorrelates the pixels of each patch: 3×h×w → filters×h×w.

    Its filters are the leading eigenvectors of the covariance of training patches over the square
    root of their eigenvalues, and the same with the opposite sign, so that the activation after it
    loses nothing (cifar10-airbench, K. Jordan). Nothing here learns.
    """

    def __init__(self, filters: int) -> None:
        super().__init__()
        _check(filters in range(2, 55, 2), "stem_filters", filters, "an even number, 2 to 54, or 0")
        self.register_buffer("weight", torch.zeros(filters, 3, 3, 3))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters from normalised training images, n×3×h×w; a few thousand suffice."""
        patches = F.unfold(images.float(), 3, stride=3).transpose(1, 2).flatten(0, 1)  # …×27
        values, vectors = torch.linalg.eigh(torch.cov(patches.double().t()))  # ascending
        half = len(self.weight) // 2
        leading = vectors.flip(1)[:, :half] / (values.flip(0)[:half] + 5e-4).sqrt()
        filters = leading.t().reshape(half, 3, 3, 3)
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class BlockNetwork(nn.Module):
    """B1 … BK and the output block, with what stands between them.

    Args:
        blocks: a row for each intermediate block: its `channels` and `kernels`, and where wanted
            `stride`, `gate` (of this block alone), `pool` (2×2 max-pooling follows) and `residual`
            (the block's input is added before the activation; arXiv 1512.03385).
        gate: of the blocks whose row names none.
        stem_filters: of the `WhiteningStem` before B1; 0 for no stem.
        normalise: whether batch normalisation follows each block.
        activation: after the stem and each block: a name in `ACTIVATIONS`.
        implementation: see `IntermediateBlock`.
    """

    def __init__(
        self, blocks: Sequence[Mapping[str, Any]], gate: str = "linear", stem_filters: int = 0,
        normalise: bool = True, activation: str = "silu", implementation: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        _check(blocks, "blocks", blocks, "at least one block")
        _check(activation in ACTIVATIONS, "activation", activation, ", ".join(ACTIVATIONS))
        act = ACTIVATIONS[activation]
        self.stem = nn.Sequential(*([WhiteningStem(stem_filters), act()] if stem_filters else []))
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        c = stem_filters or 3
        for k, row in enumerate(blocks, 1):
            channels, stride, pool = row["channels"], row.get("stride", 1), row.get("pool", False)
            fits = (c == channels and stride == 1 and not pool) or not row.get("residual")
            _check(fits, f"residual of block {k}", True, "equal channels, stride 1 and no pooling")
            self.blocks.append(
                IntermediateBlock(
                    c, channels, row["kernels"], stride, row.get("gate") or gate,
                    bias=not normalise, implementation=implementation,
                )
            )  # fmt: skip
            self.between.append(Between(channels, pool, normalise, act(), row.get("residual")))
            c = channels
        self.output = OutputBlock(c)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, b×classes, of normalised images, b×3×h×w."""
        _check_images(x, 3)
        x = self.stem(x)  # b×filters×h×w
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x), x)
        return self.output(x)

    def gates(self, x: Tensor) -> list[Tensor]:
        """The weights a, b×L, of every block for normalised images, b×3×h×w."""
        x, a = self.stem(x), []
        for block, between in zip(self.blocks, self.between, strict=True):
            a.append(block.gate(x))
            x = between(block(x), x)
        return a


class Between(nn.Module):
    """What follows a block: pooling, batch normalisation, residual connection, activation."""

    def __init__(
        self, channels: int, pool: bool, normalise: bool, activation: nn.Module, residual: bool
    ) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        # Without a scale, which the next block's kernels make redundant, and with statistics that
        # follow quickly, as a run has a few hundred steps (both as in cifar10-airbench).
        self.norm = nn.BatchNorm2d(channels, momentum=0.4) if normalise else nn.Identity()
        if normalise:
            self.norm.weight.requires_grad_(False)
        self.activation, self.residual = activation, bool(residual)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """From the block's output y and its input x."""
        y = self.norm(self.pool(y))
        return self.activation(y + x if self.residual else y)


def basic_network(blocks: Sequence[Mapping[str, Any]]) -> BlockNetwork:
    """The sheet's basic architecture with the K, L, kernels and widths of `blocks`.

    No stem, normalisation, activation, pooling or residual connection; a is what fc gives. Where a
    block was pooled its branches have stride 2 instead, so that feature maps keep their sizes.
    """
    rows = [
        {"channels": row["channels"], "kernels": row["kernels"],
         "stride": row.get("stride", 1) * (2 if row.get("pool") else 1)}
        for row in blocks
    ]  # fmt: skip
    return BlockNetwork(rows, gate="linear", normalise=False, activation="none")


def layer_table(network: BlockNetwork) -> pd.DataFrame:
    """What each layer is, gives and costs: a row for each layer that does something.

    The index names the layer (stem, B1, after B1, … output). Columns: `what` it is; its `output`
    for one image, c×h×w; its learned `parameters`; its `multiply_adds` for one image, as the
    formula is written (convolutions and fully connected layers, as PyTorch counts them).
    """
    network, rows = copy.deepcopy(network).to("meta").eval(), {}  # shapes only

    def run(name: str, layer: nn.Module, *inputs: Tensor) -> Tensor:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            y = layer(*inputs)
        rows[name] = {
            "what": describe(layer),
            "output": "×".join(map(str, y.shape[1:])),
            "parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad),
            "multiply_adds": counter.get_total_flops() // 2,
        }
        return y

    x = run("stem", network.stem, torch.zeros(1, 3, 32, 32, device="meta"))
    for k, (block, between) in enumerate(zip(network.blocks, network.between, strict=True), 1):
        block.implementation = "reference"
        x = run(f"after B{k}", between, run(f"B{k}", block, x), x)
    run("output", network.output, x)
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")
    return table[table["what"] != ""]


def describe(layer: nn.Module) -> str:
    """A layer in a few words; none for a layer that does nothing."""
    if isinstance(layer, IntermediateBlock):
        kernels = " + ".join("{}×{}".format(*C.kernel_size) for C in layer.branches)
        step = f", stride {layer.stride}" if layer.stride > 1 else ""
        return f"branches {kernels}{step}, {layer.gate_kind} a"
    if isinstance(layer, Between | nn.Sequential):
        parts = [describe(part) for part in layer.children()]
        parts[-1:-1] = ["residual connection"] * getattr(layer, "residual", False)
        return ", ".join(filter(None, parts))
    return DESCRIPTIONS.get(type(layer), type(layer).__name__)


DESCRIPTIONS = {
    OutputBlock: "channel means, fully connected",
    WhiteningStem: "whitening 3×3",
    nn.MaxPool2d: "max-pooling 2×2",
    nn.BatchNorm2d: "batch norm",
    nn.Identity: "",
}


def _check(right: object, name: str, value: object, allowed: str) -> None:
    if not right:
        raise ValueError(f"{name}={value!r} is not allowed; use {allowed}.")


def _check_images(x: Tensor, channels: int) -> None:
    right = x.dim() == 4 and x.shape[1] == channels
    _check(right, "shape of x", tuple(x.shape), f"b×{channels}×h×w")
