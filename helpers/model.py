"""The sheet's network: input-weighted convolution blocks, and what stands between them.

In the order in which an image travels: `WhiteningStem` → `IntermediateBlock` (K times, each
followed by pooling, normalisation and activation) → `OutputBlock` → logits. The letters are the
sheet's: x is a block's input, m the mean of each of its channels, a = [a1 … aL] the weights that
the block's fully connected layer computes from m, and C1 … CL its branches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

GATES = ("linear", "softmax", "sigmoid")
FORMS = ("auto", "branches", "fused", "scaled", "mixed")
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}

IMAGES_AT_ONCE = 8  # whose mixed kernels stay in the cache together; see `mixed_convolution`
POSITIONS_PER_BRANCH = 64  # output positions at which one convolution saved pays for the mixing


def check_choice(argument: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is not known; allowed: {', '.join(allowed)}.")


def check_positive(argument: str, value: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{argument}={value!r} is not allowed; it must be an integer of at least 1."
        )


def check_images(argument: str, x: Tensor, channels: int) -> None:
    """Raise a ValueError unless `x` is a batch b×channels×h×w."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{argument} of shape {tuple(x.shape)} is not allowed; "
            f"it must be b×{channels}×h×w (a batch of images with {channels} channels)."
        )


class IntermediateBlock(nn.Module):
    """x′ = a1·C1(x) + … + aL·CL(x), with a = gate(fc(m)) and m the channel means of x.

    Shapes: x is b×in_channels×h×w, m is b×in_channels, a is b×L, and x′ is
    b×out_channels×⌈h/stride⌉×⌈w/stride⌉.

    Args:
        in_channels: channels c of x.
        out_channels: channels of x′, the same for every branch.
        branches: the number L of independent convolutional layers.
        kernel_size: one odd number for all branches, or a sequence of L odd numbers.
        stride: stride of every branch.
        gate: `"linear"` is the sheet's a, the output of the fully connected layer itself;
            `"softmax"` (Dynamic Convolution, arXiv 1912.03458) and `"sigmoid"` (CondConv,
            arXiv 1904.04971) pass it through that function.
        bias: whether the branches have biases; pointless where batch normalisation follows.
        form: how the sum is evaluated. `"branches"`: as written. `"fused"`: the same, with the
            weighted sum in one pass. Since convolution is linear, two others are the same
            function: `"scaled"`, the branches on inputs that are weighted already, Σ Cₗ(aₗ·x);
            and `"mixed"`, one convolution of each image with its own kernel, (Σ aₗ·Wₗ)∗x.
            `"auto"` takes the cheapest for the shapes at hand.

    Raises:
        ValueError: an argument that is not allowed, named with its value and what is allowed.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        branches: int = 2,
        kernel_size: int | Sequence[int] = 3,
        stride: int = 1,
        gate: str = "softmax",
        bias: bool = True,
        form: str = "auto",
    ) -> None:
        super().__init__()
        for argument, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("branches", branches),
            ("stride", stride),
        ):
            check_positive(argument, value)
        check_choice("gate", gate, GATES)
        check_choice("form", form, FORMS)
        self.gate_function = gate
        self.form = form
        self.stride = stride
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, k, stride=stride, padding=k // 2, bias=bias)
            for k in kernel_sizes(kernel_size, branches)
        )
        self.fc = nn.Linear(in_channels, branches)
        self.start_uniform()

    def start_uniform(self) -> None:
        """Let every a start at 1/L: the branches differ by their random kernels, not by a.

        A linear a with random weights would start with a random sign and scale for each image.
        """
        L = len(self.branches)
        start = {"linear": 1 / L, "softmax": 0.0, "sigmoid": -math.log(L - 1) if L > 1 else 0.0}
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, start[self.gate_function])

    def gate(self, x: Tensor) -> Tensor:
        """The weights a, b×L, of the branches for each image of x, b×c×h×w."""
        check_images("x", x, self.fc.in_features)
        m = x.mean(dim=(2, 3))
        a = self.fc(m)
        if self.gate_function == "softmax":
            return a.softmax(dim=1)
        if self.gate_function == "sigmoid":
            return a.sigmoid()
        return a

    def forward(self, x: Tensor) -> Tensor:
        """x′, b×out_channels×⌈h/stride⌉×⌈w/stride⌉."""
        a = self.gate(x)
        form = self.form_for(x)
        if form == "branches":
            return weighted_sum(x, a, self.branches)
        if form == "fused":
            return _WeightedSum.apply(a, *[branch(x).to(a.dtype) for branch in self.branches])
        if form == "scaled":
            x_new = scaled_convolutions(x, a, self.branches)
        else:
            x_new = mixed_convolution(x, a, self.stacked_kernels(), self.stride)
        if self.branches[0].bias is None:
            return x_new
        biases = torch.stack([branch.bias for branch in self.branches])
        return x_new + (a @ biases)[:, :, None, None]

    def form_for(self, x: Tensor) -> str:
        """The form that is used for x, decided by shapes alone.

        Mixing makes a kernel for each image, whatever the map's size, and saves L − 1 convolutions
        at every position of the map (fewer, where some branches have small kernels). Where it
        does not pay, the weights are applied to the smaller map: x, or what the branches make
        of it. Both rules were measured on a CPU, and are used only there.
        """
        if self.form != "auto":
            return self.form
        if x.device.type != "cpu":
            return "branches"
        positions = math.ceil(x.shape[2] / self.stride) * math.ceil(x.shape[3] / self.stride)
        areas = [branch.kernel_size[0] ** 2 for branch in self.branches]
        saved = sum(areas) / max(areas) - 1  # convolutions of the largest kernel
        if saved >= 1 and positions * saved >= POSITIONS_PER_BRANCH:
            return "mixed"
        numbers_in, numbers_out = x[0].numel(), self.branches[0].out_channels * positions
        return "scaled" if 2 * numbers_in <= numbers_out else "fused"

    def stacked_kernels(self) -> Tensor:
        """The branches' kernels, L×out×in×k×k (k the largest; smaller ones zero-padded)."""
        largest = max(branch.kernel_size[0] for branch in self.branches)
        padded = []
        for branch in self.branches:
            rim = (largest - branch.kernel_size[0]) // 2
            padded.append(F.pad(branch.weight, (rim,) * 4) if rim else branch.weight)
        return torch.stack(padded)


def one_for_each(argument: str, value: int | Sequence[int], count: int, things: str) -> list[int]:
    """A number for each of `count` things, from one number for all or one for each.

    Raises:
        ValueError: not one or `count` numbers, or one that is no integer of at least 1.
    """
    numbers = list(value) if isinstance(value, Sequence) else [value] * count
    if len(numbers) != count:
        raise ValueError(
            f"{argument}={value!r} is not allowed for {count} {things}; "
            "give one number, or one for each."
        )
    for number in numbers:
        check_positive(argument, number)
    return numbers


def kernel_sizes(kernel_size: int | Sequence[int], branches: int) -> list[int]:
    """The kernel size of each of L branches, from one number or L of them.

    Raises:
        ValueError: not L numbers, or one that is even (it could not keep the map's size).
    """
    sizes = one_for_each("kernel_size", kernel_size, branches, "branches")
    for k in sizes:
        if k % 2 == 0:
            raise ValueError(
                f"kernel_size={k} is even and cannot keep the map's size; use 1, 3, 5 …"
            )
    return sizes


def weighted_sum(x: Tensor, a: Tensor, branches: Sequence[nn.Module]) -> Tensor:
    """The sheet's formula as written: Σ aₗ·Cₗ(x), every branch on the same x, each called once."""
    first, *others = branches
    total = a[:, 0, None, None, None] * first(x)
    for l, branch in enumerate(others, start=1):
        total = total + a[:, l, None, None, None] * branch(x)
    return total


def scaled_convolutions(x: Tensor, a: Tensor, branches: Sequence[nn.Conv2d]) -> Tensor:
    """Σ Wₗ∗(aₗ·x): the weights on the way in instead of the way out; biases are left out."""
    inputs = (scale * x for scale in a[:, :, None, None, None].unbind(dim=1))
    return sum(
        F.conv2d(y, branch.weight, None, branch.stride, branch.padding)
        for y, branch in zip(inputs, branches, strict=True)
    )


class _WeightedSum(torch.autograd.Function):
    """Σ aₗ·yₗ of b×out×h×w maps yₗ, in one pass over each of them, there and back.

    Written with `*` and `+`, every product would be a map of its own, written and read again; on
    large maps that took as long as the convolutions.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(a, *maps)
        scales = a[:, :, None, None, None].unbind(dim=1)
        total = scales[0] * maps[0]
        for scale, y in zip(scales[1:], maps[1:], strict=True):
            total.addcmul_(scale, y)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        a, *maps = ctx.saved_tensors
        flat = grad.permute(0, 2, 3, 1).flatten(1)  # a view, in channels-last memory format
        scalar_products = [
            torch.bmm(y.permute(0, 2, 3, 1).flatten(1)[:, None], flat[:, :, None]) for y in maps
        ]
        scales = a[:, :, None, None, None].unbind(dim=1)
        return torch.cat(scalar_products, dim=1)[:, :, 0], *[scale * grad for scale in scales]


def mixed_convolution(x: Tensor, a: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Σ aₗ·(Wₗ∗x) as (Σ aₗ·Wₗ)∗x: each image is convolved once, with a kernel of its own.

    Exact, because convolution is linear in its kernel (CondConv, arXiv 1904.04971, section 3).

    Args:
        x: b×in×h×w.
        a: b×L.
        weight: L×out×in×k×k, k odd.
        stride: of the convolution; padding is k // 2.

    Returns:
        b×out×⌈h/stride⌉×⌈w/stride⌉, in channels-last memory format.
    """
    return _MixedConvolution.apply(x, a, weight, stride)


class _MixedConvolution(torch.autograd.Function):
    """Mix a few images' kernels, multiply them with the patches of x, go on to the next few.

    Only x, a and the L kernels are kept for the backward pass. The kernels of one image are as
    large as a convolution's, so they are made for `IMAGES_AT_ONCE` images at a time, used while
    they are still in the cache, and made again in the backward pass rather than stored.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor, stride: int) -> Tensor:
        L, out, c, k, _ = weight.shape
        bank = weight.permute(0, 3, 4, 2, 1).reshape(L, k * k * c * out)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, k // 2, k // 2, k // 2, k // 2))
        padded = padded.contiguous()  # padding by 0 (k = 1) keeps x's own memory format
        h, w = -(-x.shape[2] // stride), -(-x.shape[3] // stride)
        x_new = x.new_empty(len(x), h * w, out)
        for part in _parts(len(x)):
            kernels = (a[part] @ bank).view(-1, k * k * c, out)
            torch.bmm(_patches(padded[part], h, w, k, stride), kernels, out=x_new[part])
        ctx.save_for_backward(padded, a, bank)
        ctx.sizes = (L, out, c, k, h, w, stride, x.shape[2], x.shape[3])
        return x_new.view(len(x), h, w, out).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_new: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        padded, a, bank = ctx.saved_tensors
        L, out, c, k, h, w, stride, height, width = ctx.sizes
        grad = grad_x_new.permute(0, 2, 3, 1).reshape(len(a), h * w, out)
        grad_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        grad_a, grad_bank = torch.empty_like(a), torch.zeros_like(bank)
        for part in _parts(len(a)):
            if grad_padded is not None:
                kernels = (a[part] @ bank).view(-1, k * k * c, out)
                grad_patches = torch.bmm(grad[part], kernels.transpose(1, 2))
                _add_patches(grad_padded[part], grad_patches.view(-1, h, w, k, k, c), stride)
            patches = _patches(padded[part], h, w, k, stride)
            grad_kernels = torch.bmm(patches.transpose(1, 2), grad[part]).view(-1, bank.shape[1])
            grad_bank.addmm_(a[part].t(), grad_kernels)
            grad_a[part] = grad_kernels @ bank.t()
        grad_x, rim = None, k // 2
        if grad_padded is not None:
            grad_x = grad_padded[:, rim : rim + height, rim : rim + width].permute(0, 3, 1, 2)
        return grad_x, grad_a, grad_bank.view(L, k, k, c, out).permute(0, 4, 3, 1, 2), None


def _parts(images: int) -> list[slice]:
    return [slice(i, i + IMAGES_AT_ONCE) for i in range(0, images, IMAGES_AT_ONCE)]


def _patches(padded: Tensor, h: int, w: int, k: int, stride: int) -> Tensor:
    """The k×k patches of b×H×W×c maps under h×w positions, b×(h·w)×(k·k·c)."""
    c = padded.shape[3]
    image, row, column, _ = padded.stride()
    size = (len(padded), h, w, k, k * c)
    windows = padded.as_strided(
        size, (image, row * stride, column * stride, row, 1), padded.storage_offset()
    )
    return windows.reshape(len(padded), h * w, k * k * c)


def _add_patches(padded: Tensor, patches: Tensor, stride: int) -> None:
    """Add b×h×w×k×k×c patches to the b×H×W×c maps they were taken from."""
    _, h, w, k, _, _ = patches.shape
    for dy in range(k):
        for dx in range(k):
            rows = slice(dy, dy + (h - 1) * stride + 1, stride)
            columns = slice(dx, dx + (w - 1) * stride + 1, stride)
            padded[:, rows, columns] += patches[:, :, :, dy, dx]


class OutputBlock(nn.Module):
    """Channel means m of x, then fully connected layers, to logits b×classes.

    Args:
        in_channels: channels c of x, b×c×h×w.
        classes: number of logits.
        hidden: units of each fully connected layer before the last; none by default.
    """

    def __init__(self, in_channels: int, classes: int = 10, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        units = [in_channels, *hidden, classes]
        for argument, value in zip(["in_channels", *["hidden"] * len(hidden), "classes"], units):
            check_positive(argument, value)
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        for before, after in pairwise(units):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.fc = nn.Sequential(*layers[:-1])  # no activation after the logits

    def forward(self, x: Tensor) -> Tensor:
        check_images("x", x, self.in_channels)
        m = x.mean(dim=(2, 3))
        return self.fc(m)


class WhiteningStem(nn.Module):
    """A fixed convolution that decorrelates the pixels of each patch.

    Its filters are the leading eigenvectors of the covariance of the training images' patches,
    over the square root of their eigenvalues, and the same with the opposite sign, so that the
    activation after it loses nothing (cifar10-airbench, K. Jordan). Nothing here learns, so no
    gradient has to go back through B1. 3×h×w → filters×h/stride×w/stride.

    Args:
        filters: an even number, at most twice the 3·k² numbers in a patch.
        stride: 1 (3×3 patches, the map keeps its size) or 2 (4×4 patches, the map is halved).

    Raises:
        ValueError: an argument that is not allowed, named with its value and what is allowed.
    """

    padding, regulariser = 1, 5e-4

    def __init__(self, filters: int, stride: int = 2) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stem stride={stride!r} is not allowed; use 1 or 2.")
        self.stride, self.kernel_size = stride, stride + 2
        most = 2 * 3 * self.kernel_size**2
        if not isinstance(filters, int) or filters % 2 or not 2 <= filters <= most:
            raise ValueError(
                f"stem filters={filters!r} is not allowed; use an even number from 2 to {most}."
            )
        self.register_buffer("weight", torch.zeros(filters, 3, self.kernel_size, self.kernel_size))

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters from normalised training images, n×3×h×w; a few thousand suffice."""
        check_images("images", images, 3)
        patches = F.unfold(images.float(), self.kernel_size, stride=self.kernel_size)
        patches = patches.transpose(1, 2).flatten(0, 1)  # (n·positions)×48
        covariance = torch.cov(patches.double().t())
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        half = len(self.weight) // 2
        leading = vectors.flip(1)[:, :half] / (values.flip(0)[:half] + self.regulariser).sqrt()
        filters = leading.t().reshape(half, *self.weight.shape[1:])
        self.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        check_images("x", x, 3)
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)


class BlockNetwork(nn.Module):
    """B1 … BK and the output block, with what stands between them.

    Args:
        widths: output channels of each intermediate block; their number is K.
        branches: L, one number for all blocks or a sequence of K.
        kernel_size: of the branches, one odd number for all or one for each of the L branches.
        strides: stride of the branches, one number for all blocks or a sequence of K.
        gate: see `IntermediateBlock`.
        stem_filters: filters of the `WhiteningStem` before B1, or 0 for no stem.
        stem_stride: its stride, see there.
        pool_after: numbers (from 1) of the blocks after which 2×2 max-pooling halves the map.
        normalise: whether batch normalisation follows each block (scale fixed at 1).
        activation: after each block (and the stem): `"none"`, `"relu"`, `"gelu"` or `"silu"`.
        hidden: units of the output block's hidden layers.
        classes: number of logits.
        form: see `IntermediateBlock`.

    Raises:
        ValueError: an argument that is not allowed, named with its value and what is allowed.
    """

    def __init__(
        self,
        widths: Sequence[int],
        branches: int | Sequence[int] = 2,
        kernel_size: int | Sequence[int] = 3,
        strides: int | Sequence[int] = 1,
        gate: str = "softmax",
        stem_filters: int = 0,
        stem_stride: int = 2,
        pool_after: Sequence[int] = (),
        normalise: bool = True,
        activation: str = "silu",
        hidden: Sequence[int] = (),
        classes: int = 10,
        form: str = "auto",
    ) -> None:
        super().__init__()
        if not widths:
            raise ValueError(
                "widths=[] is not allowed; name the output channels of at least one block."
            )
        check_choice("activation", activation, tuple(ACTIVATIONS))
        K = len(widths)
        Ls = one_for_each("branches", branches, K, "blocks")
        steps = one_for_each("strides", strides, K, "blocks")
        for number in pool_after:
            if number not in range(1, K + 1):
                raise ValueError(
                    f"pool_after={list(pool_after)!r} is not allowed; blocks are 1 to {K}."
                )
        stem: list[nn.Module] = []
        if stem_filters:
            stem = [WhiteningStem(stem_filters, stem_stride), ACTIVATIONS[activation]()]
        self.stem = nn.Sequential(*stem)
        channels = [stem_filters or 3, *widths]
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for k in range(K):
            self.blocks.append(
                IntermediateBlock(
                    channels[k], channels[k + 1], Ls[k], kernel_size, steps[k], gate,
                    bias=not normalise, form=form,
                )
            )  # fmt: skip
            after: list[nn.Module] = [nn.MaxPool2d(2)] if k + 1 in pool_after else []
            if normalise:
                after.append(BatchNorm(channels[k + 1]))
            self.between.append(nn.Sequential(*after, ACTIVATIONS[activation]()))
        self.output = OutputBlock(channels[-1], classes, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, b×classes, of normalised images, b×3×h×w."""
        check_images("x", x, 3)
        x = self.stem(x)
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x))
        return self.output(x)

    def gates(self, x: Tensor) -> list[Tensor]:
        """The weights a, b×L, of every block for normalised images, b×3×h×w."""
        check_images("x", x, 3)
        x = self.stem(x)
        weights = []
        for block, between in zip(self.blocks, self.between, strict=True):
            weights.append(block.gate(x))
            x = between(block(x))
        return weights

    def fit_stem(self, images: Tensor) -> None:
        """Set the whitening filters, if there is a stem, from normalised training images."""
        if len(self.stem):
            self.stem[0].fit(images)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with its scale fixed at 1 and quick running statistics.

    A scale is redundant with the next block's kernels, and a run of a few hundred steps needs
    statistics that follow quickly (both as in cifar10-airbench).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)


def basic_network(classes: int = 10) -> BlockNetwork:
    """The sheet's network with nothing added: four blocks of the bare formula, and channel means.

    No stem, normalisation, activation or pooling; a is the fully connected layer's own output.
    Strides halve the map, since nothing else here would.
    """
    return BlockNetwork(
        widths=(32, 64, 64, 128), branches=3, strides=(1, 2, 2, 2), gate="linear",
        normalise=False, activation="none", classes=classes,
    )  # fmt: skip


def layer_table(network: BlockNetwork, image_size: int = 32) -> pd.DataFrame:
    """What each layer is, gives and costs: a row for each, in the order of the data's way.

    The index names the layer (stem, B1, after B1, … output); layers that do nothing have no row.
    Columns: `what` it is; its `output` for one image, c×h×w; its learned `parameters`; the
    `form` in which a block's sum is evaluated; and its multiply-adds for one image, as the
    formula is written (L convolutions, fully connected layer, weighted sum) and as it is
    evaluated in that form. One multiply-add is one multiplication with its addition: means,
    biases, pooling, normalisation and activations count none.

    Args:
        network: on any device, since the form may depend on it; it is not changed.
        image_size: height and width of the images in pixels.
    """
    network = copy.deepcopy(network).eval()  # the hooks stay with the copy
    rows: list[dict[str, Any]] = []
    for name, layer in _named_layers(network):
        layer.register_forward_hook(partial(_append_row, rows, name))
    device = network.output.fc[-1].weight.device
    with torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device=device))
    return pd.DataFrame(rows).set_index("layer")


def _named_layers(network: BlockNetwork) -> Iterator[tuple[str, nn.Module]]:
    yield "stem", network.stem
    for k, (block, between) in enumerate(zip(network.blocks, network.between, strict=True), 1):
        yield f"B{k}", block
        yield f"after B{k}", between
    yield "output", network.output


def _append_row(
    rows: list[dict[str, Any]], name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor
) -> None:
    what = _what_it_is(layer)
    if not what:
        return
    written, evaluated = _multiply_adds(layer, inputs[0], output)
    learned = [p.numel() for p in layer.parameters() if p.requires_grad]
    rows.append(
        {
            "layer": name,
            "what": what,
            "output": "×".join(str(n) for n in output.shape[1:]),
            "parameters": sum(learned),
            "form": layer.form_for(inputs[0]) if isinstance(layer, IntermediateBlock) else "",
            "multiply-adds as written": written,
            "multiply-adds as evaluated": evaluated,
        }
    )


def _what_it_is(layer: nn.Module) -> str:
    """A layer in a few words; none for a layer that does nothing."""
    match layer:
        case IntermediateBlock():
            sizes = [branch.kernel_size[0] for branch in layer.branches]
            kernels = ", ".join(f"{k}×{k}" for k in sorted(set(sizes)))
            step = f", stride {layer.stride}" if layer.stride > 1 else ""
            return f"{len(sizes)} branches {kernels}{step}, {layer.gate_function} a"
        case OutputBlock():
            units = [str(fc.out_features) for fc in layer.fc if isinstance(fc, nn.Linear)]
            return f"channel means, fully connected {' → '.join([str(layer.in_channels), *units])}"
        case nn.Sequential():
            return ", ".join(filter(None, map(_what_it_is, layer)))
        case WhiteningStem():
            return f"whitening {layer.kernel_size}×{layer.kernel_size}, stride {layer.stride}"
        case nn.MaxPool2d():
            return f"max-pool {layer.kernel_size}×{layer.kernel_size}"
        case BatchNorm():
            return "batch norm"
        case nn.Identity():
            return ""
        case _:
            return type(layer).__name__


def _multiply_adds(layer: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
    """Of one image, as the formula is written and as it is evaluated."""
    if isinstance(layer, IntermediateBlock):
        return _block_multiply_adds(layer, x, output)
    plain = 0
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            plain += part.weight.numel()
        if isinstance(part, WhiteningStem):
            plain += part.weight.numel() * output.shape[2:].numel()
    return plain, plain


def _block_multiply_adds(block: IntermediateBlock, x: Tensor, output: Tensor) -> tuple[int, int]:
    c, out, L = x.shape[1], output.shape[1], len(block.branches)
    positions = output.shape[2:].numel()
    kernels = [branch.weight.numel() for branch in block.branches]  # out·c·k² each
    gate, biases = c * L, 0 if block.branches[0].bias is None else L * out
    written = gate + sum(kernels) * positions + L * out * positions
    match block.form_for(x):
        case "scaled":
            scaling = L * x[0].numel()
            return written, gate + scaling + sum(kernels) * positions + biases
        case "mixed":
            return written, gate + L * max(kernels) + max(kernels) * positions + biases
        case _:
            return written, written
