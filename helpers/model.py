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
from functools import cache, partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from helpers import mixing

GATES = ("linear", "softmax", "sigmoid", "constant", "uniform")
FORMS = (
    "auto", "branches", "fused", "products", "scaled", "grouped", "patches", "winograd", "compiled"
)  # fmt: skip
ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Rule(NamedTuple):
    """Where which form is the cheapest on a kind of CPU; for `IntermediateBlock.parts`."""

    mixing: float  # Σ k² over the largest k², from which on it pays on large maps to mix kernels
    mixed: str  # how to convolve with mixed kernels: "grouped", or "patches" (stride 1)
    winograd: float  # in·out / (in + out), from which on Winograd's tiles pay, if kernels don't mix
    winograd_a_branch: float  # the same, for each 3×3 branch, against mixed kernels
    # The same over the positions of the map, from which on products of patches come first.
    product: float = math.inf
    widening: float = 1  # factor on `mixing` where out ≥ 2·in
    shared: bool = False  # whether `winograd` is divided by the number of 3×3 branches
    # From how many positions on that a convolution is spared form `compiled` pays (the benchmark's
    # `compiled.csv`), with up to `CACHED` channels; and what `winograd_a_branch` is against it.
    compiled: float = math.inf
    winograd_compiled: float = math.inf


# By what a CPU calculates with, measured by `make bench`: the faster its plain convolutions are,
# the less can be saved on them. (Those of AVX2 and AMX are from before Winograd's tiles lay place
# by place and maps of float32 numbers were transposed block by block, which made both forms cheaper
# with AVX512; that of AVX2 also from before mixed kernels were made for so few images at a time,
# and `shared` was not tried there. The compiled program was not measured with AMX, and is not taken
# there.)
RULES = {
    ("AVX2", "float32"): Rule(2, "grouped", winograd=24, winograd_a_branch=20),
    ("AVX512", "float32"): Rule(
        2,
        "grouped",
        winograd=80,
        winograd_a_branch=20,
        shared=True,
        compiled=7,
        winograd_compiled=70,
    ),
    ("AVX512", "bfloat16"): Rule(
        1.7, "patches", winograd=math.inf, winograd_a_branch=math.inf, product=30, compiled=7
    ),
    ("AMX", "float32"): Rule(
        2, "grouped", winograd=80, winograd_a_branch=20, product=30, shared=True
    ),
    ("AMX", "bfloat16"): Rule(
        3, "patches", winograd=math.inf, winograd_a_branch=math.inf, product=4, widening=2
    ),
}
CACHED = 96  # in·out / (in + out), with more of which form `compiled` pays later by that factor
MIXING_POSITIONS = 144  # of a map; on smaller ones mixing takes that many times more kernels
# Numbers that exist at a time in form `patches` and in the mixed kernels of `grouped`: on a CPU so
# few that they stay in its caches, if that leaves enough images to convolve in one call.
PATCHES_AT_ONCE = {"cpu": 2**21, "cuda": 2**28}
KERNELS_AT_ONCE = {"cpu": 2**19, "cuda": 2**28}
GROUPS_AT_LEAST = 16  # images, in form `grouped`
TILES_AT_ONCE = 256  # so that what is made of them stays in the cache


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


def check_compiled(
    c: int, out: int, stride: int, dtype: torch.dtype = torch.float32, kind: str = "cpu"
) -> None:
    """Raise a ValueError if form `"compiled"` cannot be had here, or not for a block like this."""
    if mixing.missing():
        raise ValueError(
            f"form='compiled' cannot be had here: {mixing.missing()} Use form='auto', "
            "which does without it."
        )
    if kind != "cpu" or not mixing.fits(dtype):
        raise ValueError(
            f"form='compiled' is not allowed for {dtype} numbers on {kind}; it needs a CPU and "
            "float32, or bfloat16 where the CPU calculates with it."
        )
    if not mixing.fits(dtype, c, out):
        raise ValueError(
            f"form='compiled' is not allowed with in_channels={c} and out_channels={out}; "
            f"it needs multiples of {mixing.CHANNELS}."
        )
    if stride != 1:
        raise ValueError(f"form='compiled' is not allowed with stride={stride}; it needs 1.")


def check_images(argument: str, x: Tensor, channels: int) -> None:
    """Raise a ValueError unless `x` is a batch b×channels×h×w."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(
            f"{argument} of shape {tuple(x.shape)} is not allowed; "
            f"it must be b×{channels}×h×w (a batch of images with {channels} channels)."
        )


def channel_means(x: Tensor) -> Tensor:
    """The mean m of each channel of x: b×c from b×c×h×w.

    A sum divided by a number, whose gradient stays an expanded view. That of `x.mean` is written
    out in contiguous memory format, and to add it to others in channels-last takes several times
    as long.
    """
    return x.sum(dim=(2, 3)) / x.shape[2:].numel()


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
            arXiv 1904.04971) pass it through that function. Two others, to compare with, do not
            look at m: `"constant"` is the softmax of L learned numbers, `"uniform"` is 1/L.
        bias: whether the branches have biases; pointless where batch normalisation follows.
        form: how the sum is evaluated. `"branches"`: as written. `"fused"`: the same, with the
            weighted sum in one pass; `"products"` (stride 1): with, besides, each convolution as
            one matrix product of all images' patches. Since convolution is linear, five others are
            the same function: `"scaled"`, Σ Wₗ∗(aₗ·x); `"grouped"`, one convolution of each image
            with its own kernel, (Σ aₗ·Wₗ)∗x; `"patches"` (stride 1), the same as one matrix product
            for each image; `"compiled"` (stride 1, on a CPU), the same by a program in C++
            (`helpers/mixing.py`, which says what it takes); and `"winograd"` (3×3 and 1×1 kernels,
            stride 1), the sum inside Winograd's short convolution of tiles.
            `"auto"` takes on a CPU by measured rules a cheap one for the shapes at hand, and on a
            GPU `"fused"` or `"scaled"`.
            Only in `"branches"` are the branches called as modules (with their hooks), and can
            gradients of gradients be had; it is all there is on devices other than these two.

    Attributes:
        temperature: of the softmax, which is nearly uniform where it is high (arXiv 1912.03458).

    Raises:
        ValueError: an argument that is not allowed, named with its value and what is allowed; or,
            when called, an x that is not b×in_channels×h×w, or that form `"compiled"` cannot take.
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
        sizes = kernel_sizes(kernel_size, branches)
        if form == "compiled":
            check_compiled(in_channels, out_channels, stride)
        if form in ("patches", "products") and stride != 1:
            raise ValueError(f"form={form!r} is not allowed with stride={stride}; it needs 1.")
        if form == "winograd" and (stride != 1 or max(sizes) != 3):
            raise ValueError(
                f"form='winograd' is not allowed with kernel_size={kernel_size!r} and "
                f"stride={stride}; it needs 3×3 kernels and stride 1."
            )
        self.gate_function, self.temperature = gate, 1.0
        self.form = form
        self.stride = stride
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, k, stride=stride, padding=k // 2, bias=bias)
            for k in sizes
        )
        self.fc = nn.Linear(in_channels, branches)
        self.start_uniform()

    def start_uniform(self) -> None:
        """Let every a start at 1/L (a single sigmoid's at 1/2): the branches differ by their random
        kernels, not by a.

        A linear a with random weights would start with a random sign and scale for each image.
        What a constant or uniform a does not learn stays at its start for good.
        """
        L = len(self.branches)
        start = {"linear": 1 / L, "sigmoid": -math.log(L - 1) if L > 1 else 0.0}
        nn.init.zeros_(self.fc.weight)
        nn.init.constant_(self.fc.bias, start.get(self.gate_function, 0.0))
        self.fc.weight.requires_grad_(self.gate_function not in ("constant", "uniform"))
        self.fc.bias.requires_grad_(self.gate_function != "uniform")

    def gate(self, x: Tensor) -> Tensor:
        """The weights a, b×L, of the branches for each image of x, b×c×h×w."""
        check_images("x", x, self.fc.in_features)
        if self.gate_function in ("constant", "uniform"):  # no function of m
            return (self.fc.bias / self.temperature).softmax(dim=0).expand(len(x), -1)
        m = channel_means(x)
        a = self.fc(m)
        if self.gate_function == "linear":
            return a
        if self.gate_function == "sigmoid":
            return a.sigmoid()
        return (a / self.temperature).softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """x′, b×out_channels×⌈h/stride⌉×⌈w/stride⌉."""
        a = self.gate(x)
        terms = (self.evaluate(form, part, x, a) for form, part in self.parts(x))
        return reduce(torch.add, terms)

    def parts(self, x: Tensor) -> list[tuple[str, list[int]]]:
        """Which branches are evaluated together for x, and in which form; decided by shapes and by
        what the CPU calculates with.

        A mixed kernel is one convolution instead of L, but has to be made for each image, however
        small its map: large maps, or many branches. Made and used in the cache, by a compiled
        program, it pays from where what is saved is a convolution of seven positions, or of twice
        as many where hundreds of channels leave too little cache; by PyTorch's operations, of a
        hundred and more. By these, where products are quick, it is cheaper to copy the map's
        patches than to rearrange a kernel for each image; and where blocks widen, mixing pays from
        more branches on, since a is else multiplied with x. Winograd's tiles save more than half of
        the multiplications of 3×3 kernels (in·out), at a price for each channel (in + out), part of
        which all branches share: many channels, or several branches, but few against mixed kernels,
        whose price hardly grows with L; and more than one if the map is not cut into whole tiles.
        Small maps of many channels go through products, where a CPU's own convolution is slow for
        them. From where on is in `RULES`, for CPUs. The rest is evaluated as written but for where
        a is multiplied: with x where that is fewer numbers than the result, else in one pass with
        what the branches give; one branch alone wholly as written, since its map costs less time to
        keep than to do without. On a GPU all of it is the rest, one branch too: mixing kernels pays
        only with about eight there. On devices other than these two all is evaluated as written.
        """
        everyone, device = list(range(len(self.branches))), x.device.type
        if device not in ("cpu", "cuda"):
            return [("branches", everyone)]
        if self.form != "auto":
            return [(self.form, everyone)]
        sizes = [branch.kernel_size[0] for branch in self.branches]
        positions = math.ceil(x.shape[2] / self.stride) * math.ceil(x.shape[3] / self.stride)
        out = self.branches[0].out_channels
        plain = "scaled" if x.shape[1:].numel() < out * positions else "fused"
        if device == "cuda":
            return [(plain, everyone)]
        if len(sizes) == 1:
            plain = "branches"
        rule, kernels = rule_here(), sum(k * k for k in sizes) / max(sizes) ** 2
        mixed = rule.mixed if self.stride == 1 else "grouped"
        threes = [l for l, k in enumerate(sizes) if k == 3 and self.stride == 1]
        rest = [l for l in everyone if l not in threes]
        c = x.shape[1]
        channels, wider = c * out / (c + out), rule.widening if out >= 2 * c else 1
        mixes = kernels >= rule.mixing * wider * max(1, MIXING_POSITIONS / positions)
        pays = (kernels - 1) * positions >= rule.compiled * max(1, channels / CACHED)
        compiled = pays and self.compiles()
        if self.stride == 1 and channels >= rule.product * positions and not compiled:
            return [("products", everyone)]
        needed = rule.winograd / (max(1, len(threes)) if rule.shared else 1)
        if compiled or mixes:
            a_branch = rule.winograd_compiled if compiled else rule.winograd_a_branch
            needed = a_branch * len(threes)
        whole = x.shape[2:] == _whole_tiles(*x.shape[2:])
        if channels >= needed and len(threes) >= (1 if whole else 2):
            return [("winograd", threes)] + [(plain, rest)] * bool(rest)
        return [("compiled" if compiled else mixed if mixes else plain, everyone)]

    @torch.compiler.disable  # nothing of it is for tracing
    def compiles(self) -> bool:
        """Whether form `"compiled"` can be had here for this block."""
        numbers = number_type("cpu", self.branches[0])
        channels = self.fc.in_features, self.branches[0].out_channels
        return self.stride == 1 and mixing.fits(numbers, *channels) and not mixing.missing()

    @torch.compiler.disable  # its functions have gradients of their own, which are not for tracing
    def evaluate(self, form: str, part: list[int], x: Tensor, a: Tensor) -> Tensor:
        """The terms aₗ·Cₗ(x) of the branches numbered in `part`, added up in one of `FORMS`."""
        branches = [self.branches[l] for l in part]
        a = torch.stack([a[:, l] for l in part], dim=1)  # a list as index would keep a GPU waiting
        if form == "branches":
            return weighted_sum(x, a, branches)
        kind = x.device.type
        dtype = number_type(kind, branches[0])
        if form == "winograd":
            dtype = branches[0].weight.dtype  # its tiles lose more
        with torch.autocast(kind, enabled=False):  # own gradients, of one number type
            x, a = x.to(dtype), a.to(dtype)
            if form == "compiled":
                check_compiled(x.shape[1], branches[0].out_channels, self.stride, dtype, kind)
            weights = [branch.weight for branch in branches]
            if form in ("fused", "products", "scaled"):
                kernels = [weight.to(dtype) for weight in weights]
                x_new = _SumOfConvolutions.apply(x, a, form, self.stride, *kernels)
            elif form == "compiled":
                x_new = _CompiledConvolution.apply(x, a, *weights)
            elif form == "grouped":
                kernels = stacked_kernels(weights, dtype)
                x_new = _GroupedConvolution.apply(x, a, kernels, self.stride)
            else:
                x_new = STACKED[form].apply(x, a, stacked_kernels(weights, dtype))
        return with_biases(x_new, a, branches)


def number_type(kind: str, branch: nn.Conv2d) -> torch.dtype:
    """What a branch calculates with on a kind of device: autocast's numbers, or its own."""
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return branch.weight.dtype


def instructions() -> str:
    """What the CPU calculates with: AMX (on whole tiles of bfloat16 numbers, and all else as with
    AVX512), AVX512, AVX2, or what else PyTorch calls it."""
    tiles = torch.cpu.get_capabilities().get("amx_bf16", False)
    return "AMX" if tiles else torch.backends.cpu.get_cpu_capability()


def rule_here() -> Rule:
    """The rule for the CPU and the numbers that are calculated with here, bfloat16 under autocast;
    where nothing was measured, that of AVX512 for bfloat16 and that of AVX2 for float32."""
    if torch.is_autocast_enabled("cpu"):
        return RULES.get((instructions(), "bfloat16"), RULES["AVX512", "bfloat16"])
    return RULES.get((instructions(), "float32"), RULES["AVX2", "float32"])


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
    maps = (branch(x) for branch in branches)
    return reduce(torch.add, (s.to(y.dtype) * y for s, y in zip(_scales(a), maps, strict=True)))


def with_biases(x_new: Tensor, a: Tensor, branches: Sequence[nn.Conv2d]) -> Tensor:
    """x′, b×out×h×w, with Σ aₗ·bₗ added, if the branches have biases bₗ; a is b×L."""
    if branches[0].bias is None:
        return x_new
    biases = torch.stack([branch.bias for branch in branches])
    return x_new + (a @ biases)[:, :, None, None]


class _SumOfConvolutions(torch.autograd.Function):
    """Σ aₗ·(Wₗ∗x), one convolution after the other, of which no map is kept.

    With `*` and `+`, every product would be a map of its own, kept for the backward pass: memory
    would grow with L, and on large maps writing and reading it took as long as the convolutions.
    With g the gradient of x′, that of Wₗ needs aₗ·x, made again, and g; and g led back through Wₗ,
    uₗ, gives that of x, Σ aₗ·uₗ, and that of aₗ, ⟨x, uₗ⟩. The maps keep their number type.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, form: str, stride: int, *kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, *kernels)
        ctx.form, ctx.stride = form, stride
        x_new = None
        for scale, kernel in zip(_scales(a), kernels, strict=True):
            y = _convolution(scale * x if form == "scaled" else x, kernel, form, stride)
            if form == "scaled":
                x_new = y if x_new is None else x_new.add_(y)
            else:
                x_new = scale * y if x_new is None else x_new.addcmul_(scale, y)
        return x_new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, *kernels = ctx.saved_tensors
        to_x, to_a = ctx.needs_input_grad[:2]
        grad_x, grad_a, grad_kernels, flat = None, torch.empty_like(a), [], _flat(x)
        for l, (scale, kernel) in enumerate(zip(_scales(a), kernels, strict=True)):
            u, grad_kernel = _convolution_backward(
                grad, scale * x, kernel, ctx.form, ctx.stride, to_x or to_a
            )
            grad_kernels.append(grad_kernel)
            if to_a:
                grad_a[:, l] = torch.linalg.vecdot(flat, _flat(u))
            if to_x:
                grad_x = scale * u if grad_x is None else grad_x.addcmul_(scale, u)
        return grad_x, grad_a if to_a else None, None, None, *grad_kernels


def _scales(a: Tensor) -> tuple[Tensor, ...]:
    """The weights a, b×L, as L factors for b×c×h×w maps."""
    return a[:, :, None, None, None].unbind(dim=1)


def _flat(maps: Tensor) -> Tensor:
    """b×(h·w·c) from b×c×h×w, a view of maps in channels-last memory format."""
    return maps.permute(0, 2, 3, 1).flatten(1)


def _convolution(x: Tensor, kernel: Tensor, form: str, stride: int) -> Tensor:
    """kernel∗x: by the library, or in form `products` as one product, of stride 1.

    Where maps are small and channels many, oneDNN takes up to three times as long in bfloat16 with
    AMX (`bench.MIXED`: 384 channels), most of all for the kernel's gradient, which as a product is
    one more. The k×k patches of all images exist at a time, k² times their maps.
    """
    out, _, k, _ = kernel.shape
    if form != "products":
        return F.conv2d(x, kernel, None, stride, k // 2)
    x_new = F.linear(_rows(x, k), kernel.permute(0, 2, 3, 1).reshape(out, -1))
    return x_new.view(len(x), *x.shape[2:], out).permute(0, 3, 1, 2)


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, form: str, stride: int, to_x: bool
) -> tuple[Tensor | None, Tensor]:
    """The gradients of x, if `to_x`, and of the kernel, from that of what `_convolution` gives."""
    out, c, k, _ = kernel.shape
    if form != "products":
        return torch.ops.aten.convolution_backward(
            grad, x, kernel, None, [stride] * 2, [k // 2] * 2, [1, 1], False, [0, 0], 1,
            [to_x, True, False],
        )[:2]  # fmt: skip
    grad_kernel = (_rows(grad, 1).t() @ _rows(x, k)).view(out, k, k, c).permute(0, 3, 1, 2)
    turned = kernel.flip(2, 3).transpose(0, 1)
    return _convolution(grad, turned, form, stride) if to_x else None, grad_kernel


def even_kernels(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The branches' kernels, out×in×k×k (k the largest; smaller ones zero-padded), in the memory
    format that they have: channels-last in training."""
    rims = rims_of(weights)
    return [F.pad(w.to(dtype), (rim,) * 4) if rim else w.to(dtype) for w, rim in zip(weights, rims)]


def stacked_kernels(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The branches' kernels, as even as that, L×out×in×k×k, each in channels-last memory."""
    by_place = [kernel.permute(0, 2, 3, 1) for kernel in even_kernels(weights, dtype)]
    return torch.stack(by_place).permute(0, 1, 4, 2, 3)


def rims_of(weights: Sequence[Tensor]) -> list[int]:
    """How much wider the largest kernel is at each side."""
    largest = max(w.shape[-1] for w in weights)
    return [(largest - w.shape[-1]) // 2 for w in weights]


class _GroupedConvolution(torch.autograd.Function):
    """(Σ aₗ·Wₗ)∗x: mix a kernel for each image, then convolve all images in one call.

    Exact, because convolution is linear in its kernel (CondConv, arXiv 1904.04971, section 3). The
    images stand side by side as groups of channels. The kernel of one image is as large as a
    convolution's, so they are made for some images at a time, and made again in the backward pass
    instead of being kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(x, a, weight)
        ctx.stride = stride
        (h, w), out = x.shape[2:], weight.shape[1]
        x_new = x.new_empty(len(x), -(-h // stride), -(-w // stride), out).permute(0, 3, 1, 2)
        for part in _grouped_parts(x, weight):
            kernels = (a[part] @ weight.flatten(1)).view(-1, *weight.shape[2:])
            groups, padding = len(a[part]), weight.shape[3] // 2
            y = F.conv2d(_side_by_side(x[part]), kernels, None, stride, padding, 1, groups)
            _back_to_images(y, x_new[part])
        return x_new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, a, weight = ctx.saved_tensors
        bank, padding = weight.flatten(1), weight.shape[3] // 2
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_a, grad_bank = torch.empty_like(a), torch.zeros_like(bank)
        for part in _grouped_parts(x, weight):
            groups = len(a[part])
            y, kernels = _side_by_side(x[part]), (a[part] @ bank).view(-1, *weight.shape[2:])
            grad_y, grad_kernels, _ = torch.ops.aten.convolution_backward(
                _side_by_side(grad[part]), y, kernels, None, [ctx.stride] * 2, [padding] * 2,
                [1, 1], False, [0, 0], groups, [ctx.needs_input_grad[0], True, False],
            )  # fmt: skip
            grad_kernels = grad_kernels.reshape(groups, -1)
            grad_bank.addmm_(a[part].t(), grad_kernels)
            grad_a[part] = grad_kernels @ bank.t()
            if grad_y is not None:
                _back_to_images(grad_y, grad_x[part])
        return grad_x, grad_a, grad_bank.view_as(weight), None


class _PatchProducts(torch.autograd.Function):
    """(Σ aₗ·Wₗ)∗x of stride 1: the k×k patches of each image, times a kernel mixed for it.

    The patches are the rows of a matrix positions×(k²·c), a mixed kernel is one (k²·c)×out. Back to
    x it is the same with the patches of the gradient and kernels turned by 180°. No kernel has to
    be rearranged for each image, as a convolution's is. Patches and kernels are made for a few
    images at a time, and again in the backward pass; x alone is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        (out, k), (h, w) = (weight.shape[1], weight.shape[3]), x.shape[2:]
        bank, x_new = weight.permute(0, 3, 4, 2, 1).flatten(1), x.new_empty(len(x), h, w, out)
        at_once = PATCHES_AT_ONCE[x.device.type] // (h * w * weight[0, 0].numel())
        for part in _parts(len(x), at_once):
            patches = _patches(_rimmed(x[part], k // 2), k)
            kernels = (a[part] @ bank).view(len(patches), -1, out)
            torch.bmm(patches, kernels, out=x_new[part].view(len(patches), h * w, out))
        ctx.save_for_backward(x, a, weight)
        return x_new.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, a, weight = ctx.saved_tensors
        (L, out, c, k, _), (b, _, h, w) = weight.shape, grad.shape
        bank = weight.permute(0, 3, 4, 2, 1).flatten(1)
        turned = weight.flip(3, 4).permute(0, 3, 4, 1, 2).flatten(1)
        rows = grad.permute(0, 2, 3, 1).reshape(b, h * w, out)
        grad_x = grad.new_empty(b, h, w, c) if ctx.needs_input_grad[0] else None
        grad_a, grad_bank = torch.empty_like(a), torch.zeros_like(bank)
        for part in _parts(b, PATCHES_AT_ONCE[grad.device.type] // (h * w * k * k * max(c, out))):
            images = len(a[part])
            patches = _patches(_rimmed(x[part], k // 2), k)
            grad_kernels = torch.bmm(patches.transpose(1, 2), rows[part]).view(images, -1)
            grad_bank.addmm_(a[part].t(), grad_kernels)
            grad_a[part] = (bank @ grad_kernels.t()).t()  # twice as quick as the other way round
            if grad_x is not None:
                kernels = (a[part] @ turned).view(images, -1, c)
                to_x = grad_x[part].view(images, h * w, c)
                torch.bmm(_patches(_rimmed(grad[part], k // 2), k), kernels, out=to_x)
        grad_x = None if grad_x is None else grad_x.permute(0, 3, 1, 2)
        return grad_x, grad_a, grad_bank.view(L, k, k, c, out).permute(0, 4, 3, 1, 2)


class _CompiledConvolution(torch.autograd.Function):
    """(Σ aₗ·Wₗ)∗x of stride 1 by the program of `helpers/mixing.py`, which forgets each mixed
    kernel while it is in the cache. Back to x it is the same with kernels turned by 180°. Of the
    kernels no copy is kept, and their gradients have all digits of float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, *weights)
        return mixing.convolved(x, a, even_kernels(weights, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, *weights = ctx.saved_tensors
        kernels = even_kernels(weights, x.dtype)
        grad_x = mixing.led_back(grad, a, kernels) if ctx.needs_input_grad[0] else None
        grad_a, grad_kernels = mixing.gradients(x, grad, a, kernels)
        inner = [slice(rim, kernels[0].shape[-1] - rim) for rim in rims_of(weights)]
        grads = [whole[..., part, part] for whole, part in zip(grad_kernels, inner, strict=True)]
        return grad_x, grad_a.to(a.dtype), *grads


def _rows(x: Tensor, k: int) -> Tensor:
    """The k×k patches of all maps b×c×h×w, one a row: (b·h·w)×(k²·c)."""
    if k == 1:  # no copy
        return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return _patches(_rimmed(x, k // 2), k).flatten(0, 1)


def _rimmed(x: Tensor, rim: int) -> Tensor:
    """x, b×c×h×w, as b×h×w×c with a rim of zeros."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, rim, rim, rim, rim)).contiguous()


def _patches(rimmed: Tensor, k: int) -> Tensor:
    """The k×k patches of rimmed b×h×w×c maps, at stride 1: b×positions×(k²·c)."""
    views = rimmed.unfold(1, k, 1).unfold(2, k, 1)  # b×rows×columns×c×k×k
    return views.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def _grouped_parts(x: Tensor, weight: Tensor) -> list[slice]:
    at_once = KERNELS_AT_ONCE[x.device.type] // weight[0].numel()
    return _parts(len(x), max(GROUPS_AT_LEAST, at_once))


def _parts(images: int, at_once: int) -> list[slice]:
    at_once = max(1, at_once)
    return [slice(i, i + at_once) for i in range(0, images, at_once)]


def _side_by_side(x: Tensor) -> Tensor:
    """b×c×h×w as 1×(b·c)×h×w in the contiguous memory format, by its strides at 1×1 too."""
    b, c, h, w = x.shape
    if _quick_to_transpose(x):
        return _transposed(x.permute(0, 2, 3, 1).view(b, h * w, c)).view(1, b * c, h, w)
    x = x.contiguous()
    return x.as_strided((1, b * c, h, w), (b * c * h * w, h * w, w, 1), x.storage_offset())


def _back_to_images(y: Tensor, maps: Tensor) -> None:
    """Fill b×c×h×w maps from 1×(b·c)×h×w, the images side by side."""
    b, c, h, w = maps.shape
    if _quick_to_transpose(maps):
        y = _transposed(y.contiguous().view(b, c, h * w)).view(b, h, w, c).permute(0, 3, 1, 2)
    maps.copy_(y.view(maps.shape))


def _quick_to_transpose(x: Tensor) -> bool:
    """Whether x is what `_transposed` takes, position by position."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and x.permute(0, 2, 3, 1).is_contiguous()


def _transposed(matrices: Tensor) -> Tensor:
    """b×c×r from contiguous b×r×c numbers of float32 on a CPU.

    Shuffling the channels of maps of one position is the same, and PyTorch does it block by block,
    where a copy would go from column to column in strides that are mostly powers of two, which
    caches are slow at.
    """
    b, r, c = matrices.shape
    positions = matrices.as_strided(
        (b, r * c, 1, 1), (r * c, 1, r * c, r * c), matrices.storage_offset()
    )
    return F.channel_shuffle(positions, r).view(b, c, r)


@cache
def winograd_matrices() -> tuple[Tensor, Tensor, Tensor]:
    """A (6×4), B and G (6×3) with Aᵀ((G·w) ⊙ (Bᵀ·d)) = w∗d, for 3 taps w and 6 numbers d.

    Four outputs for six multiplications instead of twelve (Lavin and Gray, arXiv 1509.09308). A
    product of polynomials is known from its values at six points; the matrices evaluate at
    five points and infinity, and go back. The points decide how much is lost to rounding (Barabasz
    et al., arXiv 1803.10986, whose points for this size these are).
    """
    cpu = torch.device("cpu")  # whatever the default is at the first call
    points = torch.tensor([0, 1, -1, 0.5, -2], dtype=torch.float64, device=cpu)

    def values(degree: int) -> Tensor:
        at_infinity = torch.eye(degree + 1, dtype=torch.float64, device=cpu)[-1:]
        exponents = torch.arange(degree + 1, device=cpu)
        return torch.cat([points[:, None] ** exponents, at_infinity])

    return values(3), torch.linalg.inv(values(5)), values(2)


class _WinogradConvolution(torch.autograd.Function):
    """Σ aₗ·(Wₗ∗x) of 3×3 kernels by 4×4 tiles of the result, each from 6×6 numbers of x.

    A tile's 36 numbers are transformed, once for all branches; the L convolutions are then
    products of matrices at each of the 36 places, added up with weights a; and one transform leads
    back. 36·L products for 16 positions where the formula as written takes 144·L. Tiles are taken
    a few at a time, and transformed again in the backward pass; they lie place by place, so that a
    transform of all of them is one product.

    Rounding errors are a few times those of a plain convolution (tests/test_model.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        out, (h, w) = weight.shape[1], x.shape[2:]
        to_x_new, from_x, _ = _tile_transforms(x.dtype, x.device)
        U = _transformed(weight)
        x_new = x.new_empty(len(x), *_whole_tiles(h, w), out)
        for part in _parts(len(x), TILES_AT_ONCE // _tiles_of(h, w)):
            V = _apply(from_x, _cut(_padded(x[part], rim=1), 6))
            products = x.new_zeros(36, V.shape[1], out)
            for U_l, scale in zip(U, a[part].t(), strict=True):
                products.baddbmm_(_weighted(V, scale), U_l)
            _join(_apply(to_x_new, products), x_new[part])
        ctx.save_for_backward(x, a, weight)
        return x_new[:, :h, :w].permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, a, weight = ctx.saved_tensors
        (h, w), (L, _, c) = x.shape[2:], weight.shape[:3]
        to_x_new, from_x, from_weight = _tile_transforms(x.dtype, x.device)
        grad_x = x.new_empty(len(x), h, w, c) if ctx.needs_input_grad[0] else None
        U = _transformed(weight)
        grad_U, grad_a = torch.zeros_like(U), torch.empty_like(a)
        for part in _parts(len(a), TILES_AT_ONCE // _tiles_of(h, w)):
            padded = _padded(x[part], rim=1)
            grad_products = _apply(to_x_new.t(), _cut(_padded(grad[part], rim=0), 4))
            V = _apply(from_x, _cut(padded, 6))
            grad_V = None if grad_x is None else torch.zeros_like(V)
            for l, scale in enumerate(a[part].t()):
                grad_U[l].baddbmm_(_weighted(V, scale).transpose(1, 2), grad_products)
                u = torch.bmm(grad_products, U[l].transpose(1, 2))  # 36×tiles×c, led back
                by_image = (36, len(scale), -1)
                grad_a[part, l] = torch.linalg.vecdot(V.view(by_image), u.view(by_image)).sum(0)
                if grad_V is not None:
                    grad_V.view(by_image).addcmul_(u.view(by_image), scale[:, None])
            if grad_V is not None:
                grad_padded = torch.zeros_like(padded)
                _add(_apply(from_x.t(), grad_V), grad_padded)
                grad_x[part] = grad_padded[:, 1 : h + 1, 1 : w + 1]
        grad_weight = (from_weight.t() @ grad_U.view(L, 36, -1)).view(L, 3, 3, c, -1)
        grad_x = None if grad_x is None else grad_x.permute(0, 3, 1, 2)
        return grad_x, grad_a, grad_weight.permute(0, 4, 3, 1, 2)


@cache
def _tile_transforms(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The transforms of whole tiles: 16×36 to x′, 36×36 from x and 36×9 from W."""
    A, B, G = winograd_matrices()
    return tuple(torch.kron(m, m).to(device, dtype) for m in (A.t(), B.t(), G))


def _transformed(weight: Tensor) -> Tensor:
    """L×36×c×out: the L×out×c×3×3 kernels at the 36 places of a tile.

    Four times as many numbers, and soon made again: they are not kept for the backward pass.
    """
    L, out, c = weight.shape[:3]
    from_weight = _tile_transforms(weight.dtype, weight.device)[2]
    places = from_weight @ weight.permute(0, 3, 4, 2, 1).reshape(L, 9, -1)
    return places.view(L, 36, c, out)


def _apply(transform: Tensor, tiles: Tensor) -> Tensor:
    """n×tiles×c from m×tiles×c, by a transform n×m."""
    return (transform @ tiles.flatten(1)).view(-1, *tiles.shape[1:])


def _weighted(V: Tensor, scale: Tensor) -> Tensor:
    """Transformed tiles, 36×(b·tiles)×c, times one number for each of the b images."""
    return (V.view(36, len(scale), -1) * scale[:, None]).view_as(V)


def _whole_tiles(h: int, w: int) -> tuple[int, int]:
    """Height and width of the whole 4×4 tiles that cover h×w."""
    return 4 * math.ceil(h / 4), 4 * math.ceil(w / 4)


def _tiles_of(h: int, w: int) -> int:
    return math.ceil(h / 4) * math.ceil(w / 4)


def _padded(x: Tensor, rim: int) -> Tensor:
    """x, b×c×h×w, as b×h×w×c, with zeros to whole tiles and a rim around them."""
    (h, w), (height, width) = x.shape[2:], _whole_tiles(*x.shape[2:])
    pad = (0, 0, rim, width - w + rim, rim, height - h + rim)
    return F.pad(x.permute(0, 2, 3, 1), pad).contiguous()


def _cut(maps: Tensor, size: int) -> Tensor:
    """The tiles of b×h×w×c maps, one every 4 positions: size²×(b·tiles)×c."""
    tiles = maps.unfold(1, size, 4).unfold(2, size, 4)  # b×rows×columns×c×size×size
    return tiles.permute(4, 5, 0, 1, 2, 3).reshape(size * size, -1, maps.shape[3])


def _join(tiles: Tensor, maps: Tensor) -> None:
    """Fill b×h×w×c maps from their 4×4 tiles, 16×(b·tiles)×c."""
    b, h, w, c = maps.shape
    tiles = tiles.view(4, 4, b, h // 4, w // 4, c)
    maps.view(b, h // 4, 4, w // 4, 4, c).copy_(tiles.permute(2, 3, 0, 4, 1, 5))


def _add(tiles: Tensor, maps: Tensor) -> None:
    """Add 6×6 tiles, 36×(b·tiles)×c, to the b×h×w×c maps from which `_cut` takes them.

    Neighbours share two rows and two columns, so they are added in four pieces that do not overlap.
    """
    b, h, w, c = maps.shape
    tiles = tiles.view(6, 6, b, (h - 2) // 4, (w - 2) // 4, c)
    places = maps.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
    for rows in (slice(0, 4), slice(4, 6)):
        for columns in (slice(0, 4), slice(4, 6)):
            places[rows, columns].add_(tiles[rows, columns])


# The forms that take x, a and the branches' kernels as one tensor.
STACKED = {"patches": _PatchProducts, "winograd": _WinogradConvolution}


class OutputBlock(nn.Module):
    """Channel means m of x, then fully connected layers, to logits b×classes.

    Args:
        in_channels: channels c of x, b×c×h×w.
        classes: number of logits.
        hidden: units of each fully connected layer before the last; none by default.

    Raises:
        ValueError: a number that is no integer of at least 1; or, when called, another x.
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
        m = channel_means(x)
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
        patches = patches.transpose(1, 2).flatten(0, 1)  # (n·positions)×3·k²
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
        kernel_size: of the branches, one odd number for all or one for each of the L branches of a
            block; the same in all blocks, which then have as many branches each.
        strides: stride of the branches, one number for all blocks or a sequence of K.
        gate: see `IntermediateBlock`.
        stem_filters: filters of the `WhiteningStem` before B1, or 0 for no stem.
        stem_stride: its stride, see there.
        pool_after: numbers (from 1) of the blocks after which 2×2 max-pooling halves the map.
        residual: numbers of the blocks whose input is added to their normalised output, before
            the activation (He et al., arXiv 1512.03385).
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
        residual: Sequence[int] = (),
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
        for argument, numbers in (("pool_after", pool_after), ("residual", residual)):
            if not set(numbers) <= set(range(1, K + 1)):
                raise ValueError(
                    f"{argument}={list(numbers)!r} is not allowed; blocks are 1 to {K}."
                )
        stem: list[nn.Module] = []
        if stem_filters:
            stem = [WhiteningStem(stem_filters, stem_stride), ACTIVATIONS[activation]()]
        self.stem = nn.Sequential(*stem)
        channels = [stem_filters or 3, *widths]
        self.blocks, self.between = nn.ModuleList(), nn.ModuleList()
        for k in range(K):
            reshaped = channels[k] != channels[k + 1] or steps[k] > 1 or k + 1 in pool_after
            if k + 1 in residual and reshaped:
                raise ValueError(
                    f"residual={list(residual)!r} is not allowed; block {k + 1} gives a map of "
                    "another shape than its input's, so that they cannot be added."
                )
            self.blocks.append(
                IntermediateBlock(
                    channels[k], channels[k + 1], Ls[k], kernel_size, steps[k], gate,
                    bias=not normalise, form=form,
                )
            )  # fmt: skip
            after: list[nn.Module] = [nn.MaxPool2d(2)] if k + 1 in pool_after else []
            if normalise:
                after.append(BatchNorm(channels[k + 1]))
            after.append(ACTIVATIONS[activation]())
            self.between.append(Between(*after, residual=k + 1 in residual))
        self.output = OutputBlock(channels[-1], classes, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, b×classes, of normalised images, b×3×h×w."""
        check_images("x", x, 3)
        x = self.stem(x)
        for block, between in zip(self.blocks, self.between, strict=True):
            x = between(block(x), x)
        return self.output(x)

    def gates(self, x: Tensor) -> list[Tensor]:
        """The weights a, b×L, of every block for normalised images, b×3×h×w."""
        check_images("x", x, 3)
        x = self.stem(x)
        weights = []
        for block, between in zip(self.blocks, self.between, strict=True):
            weights.append(block.gate(x))
            x = between(block(x), x)
        return weights

    def fit_stem(self, images: Tensor) -> None:
        """Set the whitening filters, if there is a stem, from normalised training images."""
        if len(self.stem):
            self.stem[0].fit(images)


class Between(nn.Sequential):
    """What follows a block: pooling and normalisation, where they are asked for, and activation.

    Args:
        residual: whether the block's input is added before the activation, which is the last layer.
    """

    def __init__(self, *layers: nn.Module, residual: bool) -> None:
        super().__init__(*layers)
        self.residual = residual

    def forward(self, x: Tensor, block_input: Tensor) -> Tensor:
        """Of the block's output and of its input."""
        *others, activation = self
        for layer in others:
            x = layer(x)
        return activation(x + block_input if self.residual else x)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with its scale fixed at 1 and quick running statistics.

    A scale is redundant with the next block's kernels, and a run of a few hundred steps needs
    statistics that follow quickly (both as in cifar10-airbench).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.4)
        self.weight.requires_grad_(False)


def basic_network() -> BlockNetwork:
    """The sheet's network with nothing added: four blocks of the bare formula, and channel means.

    No stem, normalisation, activation or pooling; a is the fully connected layer's own output.
    Strides halve the map, since nothing else here would.
    """
    return BlockNetwork(
        widths=(32, 64, 64, 128), branches=3, strides=(1, 2, 2, 2), gate="linear",
        normalise=False, activation="none",
    )  # fmt: skip


def layer_table(network: BlockNetwork, image_size: int = 32) -> pd.DataFrame:
    """What each layer is, gives and costs: a row for each, in the order of the data's way.

    The index names the layer (stem, B1, after B1, … output); layers that do nothing have no row.
    Columns: `what` it is; its `output` for one image, c×h×w; its learned `parameters`; the
    `form` in which a block's sum is evaluated (on a CPU that for float32); and its multiply-adds
    for one image, as the formula is written (L convolutions, fully connected layer, weighted sum)
    and as it is evaluated in that form. One multiply-add is one multiplication with its addition:
    means, biases, pooling, normalisation and activations count none.

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
            "form": _forms(layer, inputs[0]) if isinstance(layer, IntermediateBlock) else "",
            "multiply-adds as written": written,
            "multiply-adds as evaluated": evaluated,
        }
    )


def _forms(block: IntermediateBlock, x: Tensor) -> str:
    """The forms in which a block is evaluated; with the kernel sizes, if there are several."""
    parts = block.parts(x)
    if len(parts) == 1:
        return parts[0][0]
    return ", ".join(
        f"{form} {k}×{k}" for form, part in parts
        for k in sorted({block.branches[l].kernel_size[0] for l in part}, reverse=True)
    )  # fmt: skip


def _what_it_is(layer: nn.Module) -> str:
    """A layer in a few words; none for a layer that does nothing."""
    match layer:
        case IntermediateBlock():
            sizes = [branch.kernel_size[0] for branch in layer.branches]
            each = dict.fromkeys(sizes) if len(set(sizes)) == 1 else sizes  # in the order of a
            kernels = ", ".join(f"{k}×{k}" for k in each)
            step = f", stride {layer.stride}" if layer.stride > 1 else ""
            return f"{len(sizes)} branches {kernels}{step}, {layer.gate_function} a"
        case OutputBlock():
            units = [str(fc.out_features) for fc in layer.fc if isinstance(fc, nn.Linear)]
            return f"channel means, fully connected {' → '.join([str(layer.in_channels), *units])}"
        case Between(residual=True):
            *others, activation = map(_what_it_is, layer)
            return ", ".join(filter(None, [*others, "block's input added", activation]))
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
    """Of one image, as the formula is written and as it is evaluated; without biases and means."""
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
    gate = 0 if block.gate_function in ("constant", "uniform") else c * L
    written = gate + sum(kernels) * positions + L * out * positions
    evaluated = gate
    for form, part in block.parts(x):
        own = [kernels[l] for l in part]
        match form:
            case "grouped" | "patches" | "compiled":
                evaluated += max(own) * (len(part) + positions)
            case "scaled":
                evaluated += len(part) * x.shape[1:].numel() + sum(own) * positions
            case "winograd":
                evaluated += _winograd_multiply_adds(len(part), c, out, output)
            case _:
                evaluated += len(part) * out * positions + sum(own) * positions
    return written, evaluated


def _winograd_multiply_adds(L: int, c: int, out: int, output: Tensor) -> int:
    """Of one image: the transforms of its tiles, the weights, and the products; W's own are shared
    by all images of a batch."""
    return _tiles_of(*output.shape[2:]) * 36 * (36 * c + L * c + L * c * out + 16 * out)
