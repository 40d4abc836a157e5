"""Convolution with mixed kernels by a small C++ program, where it can be compiled and trusted.

`mixing.cpp`, beside this file, mixes the kernels of a few images, convolves with them and forgets
them while they are in the cache of one core; PyTorch's own operations would write and read each
mixed kernel several times. It is compiled once, in a few seconds, into `build/`, which takes g++
(12 or newer) and a CPU with AVX-512. Without them, and where `model.RULES` know nothing of it, a
block's form `"auto"` is another, the same function at a higher price: `missing` says what is
missing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import data

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=x86-64-v4", "-std=gnu++20", "-fopenmp", "-fPIC")
CHANNELS = 8  # in and out channels are multiples of this
# Channels at a time, at most: of x′ forward, of x backward.
OUT_AT_ONCE, IN_AT_ONCE = 64, 32
# For every so many images it is worth to have a thread: `MIXED` and `LED_BACK` of the program.
MIXED, LED_BACK = 4, 8
# Each thread adds up the kernels' gradients in a copy of its own; all copies together have at most
# so many numbers, or fewer threads take part.
SUMS = 2**26


class Unavailable(RuntimeError):
    """The program cannot be had here, or has refused what it was given."""


class _Shape(ctypes.Structure):
    """`Shape` of the C++ program."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("b", "height", "width", "c", "out", "k", "L", "block", "threads", "turned")
    ]


def fits(dtype: torch.dtype, *channels: int) -> bool:
    """Whether the program takes numbers of this type and maps of so many channels."""
    half = torch.cpu.get_capabilities().get("avx512_bf16", False)
    known = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    return dtype in known and all(c % CHANNELS == 0 for c in channels)


@cache
def missing() -> str:
    """Why the program cannot be had here, in one sentence; empty if it can."""
    try:
        right = _agrees()
    except Unavailable as error:
        return str(error)
    return "" if right else f"{SOURCE.name} was compiled, but does not compute what it should."


def convolved(x: Tensor, a: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """(Σ aₗ·Wₗ)∗x of stride 1, as wide as x: b×out×h×w in channels-last memory format.

    Args:
        x: b×c×h×w, of float32 or bfloat16 numbers on the CPU; c a multiple of `CHANNELS`.
        a: b×L.
        kernels: L of them, out×c×k×k, of the numbers of x; k odd, `out` a multiple of `CHANNELS`.
            Those in channels-last memory are not copied.

    Raises:
        Unavailable: the program cannot be had, or does not take this.
    """
    return _convolved(x, a, kernels, kernels[0].shape[0], turned=False)


def led_back(grad: Tensor, a: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    """The gradient of x, b×c×h×w, from that of what `convolved` gives, b×out×h×w: convolved with
    kernels turned by 180°.

    Raises:
        Unavailable: the program cannot be had, or does not take this.
    """
    return _convolved(grad, a, kernels, kernels[0].shape[1], turned=True)


def _convolved(x: Tensor, a: Tensor, kernels: Sequence[Tensor], out: int, turned: bool) -> Tensor:
    (b, c, h, w), L, k = x.shape, len(kernels), kernels[0].shape[-1]
    threads = max(1, min(torch.get_num_threads(), -(-b // MIXED)))
    shape = _Shape(b, h, w, c, out, k, L, _divisor(out, OUT_AT_ONCE), threads, turned)
    x_new = x.new_empty(b, h, w, out)
    even = F.pad(a.to(x.dtype), (0, L % 2)).contiguous()  # so that they can be taken two at a time
    _call("convolve", shape, x.dtype, _by_position(x), even, _by_positions(kernels), x_new)
    return x_new.permute(0, 3, 1, 2)


def gradients(
    x: Tensor, grad: Tensor, a: Tensor, kernels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The gradients of a, b×L, and of the kernels, L×out×c×k×k, both of float32 numbers, from that
    of what `convolved` gives, b×out×h×w.

    Raises:
        Unavailable: the program cannot be had, or does not take this.
    """
    (b, c, h, w), L, (out, _, k, _) = x.shape, len(kernels), kernels[0].shape
    most = min(b // LED_BACK, SUMS // (L * kernels[0].numel()))
    threads = max(1, min(torch.get_num_threads(), most))
    shape = _Shape(b, h, w, c, out, k, L, _divisor(c, IN_AT_ONCE), threads, False)
    grad_a = x.new_zeros(b, L, dtype=torch.float32)
    grad_kernels = x.new_empty(L, out, k, k, c, dtype=torch.float32)
    if b == 0:  # the program's threads begin with an image each
        return grad_a, grad_kernels.zero_().movedim(4, 2)
    numbers = _by_position(x), _by_position(grad), a.float().contiguous(), _by_positions(kernels)
    _call("gradients", shape, x.dtype, *numbers, grad_kernels, grad_a)
    return grad_a, grad_kernels.movedim(4, 2)


def _by_position(maps: Tensor) -> Tensor:
    """Maps with their channels last, one after the other: b×h×w×c from b×c×h×w."""
    return maps.movedim(-3, -1).contiguous()


def _by_positions(kernels: Sequence[Tensor]) -> list[Tensor]:
    """The same for kernels, of which the program is told one shape and one number type."""
    if len({(kernel.shape, kernel.dtype) for kernel in kernels}) > 1:
        raise Unavailable(f"{SOURCE.name} takes kernels of one shape and one number type only.")
    return [_by_position(kernel) for kernel in kernels]


def _divisor(channels: int, most: int) -> int:
    """The largest multiple of `CHANNELS` that divides the channels, and is no more than `most`."""
    sizes = range(CHANNELS, most + 1, CHANNELS)
    return max((n for n in sizes if channels % n == 0), default=CHANNELS)


def _call(name: str, shape: _Shape, dtype: torch.dtype, *arrays: Tensor | list[Tensor]) -> None:
    """Call one of the program's functions; the arrays are inputs, and outputs, all contiguous."""
    tensors = [t for array in arrays for t in (array if isinstance(array, list) else [array])]
    if not fits(dtype, shape.c, shape.out) or any(t.device.type != "cpu" for t in tensors):
        raise Unavailable(
            f"{SOURCE.name} does not take maps of {shape.c} and {shape.out} channels of {dtype} "
            f"numbers on {tensors[0].device.type}; `mixing.fits` says what it takes."
        )
    function = getattr(_library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_bool
    if function(*map(_pointer, arrays), ctypes.byref(shape)):
        raise Unavailable(
            f"oneDNN refuses products of {dtype} numbers here, or there is too little memory for "
            "them; another form than 'compiled', such as 'branches', does without."
        )


def _pointer(array: Tensor | list[Tensor]) -> Any:
    """To the numbers of a tensor; to a list of pointers for a list of tensors."""
    if isinstance(array, list):
        return (ctypes.c_void_p * len(array))(*(tensor.data_ptr() for tensor in array))
    return ctypes.c_void_p(array.data_ptr())


@cache
def _library() -> ctypes.CDLL:
    """The compiled program.

    Raises:
        Unavailable: what is missing to compile or to load it.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":
        raise Unavailable(f"The CPU, or PyTorch on it, calculates with {capability}, not AVX-512.")
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise Unavailable(f"There is no C++ compiler {compiler[0]} (CXX can name another).")
    if not SOURCE.is_file():
        raise Unavailable(f"{SOURCE.name} is missing.")
    flags = FLAGS + ("-mavx512bf16",) * fits(torch.bfloat16)  # rounds in one instruction
    of = "\n".join((SOURCE.read_text(), torch.__version__, torch.__file__, *flags))
    target = data.ROOT / "build" / f"mixing-{hashlib.sha256(of.encode()).hexdigest()[:12]}.so"
    if not target.is_file():
        _compile(compiler, flags, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(
            f"{target.name} cannot be loaded ({error}); without the file it is compiled anew."
        ) from error


def _compile(compiler: list[str], flags: tuple[str, ...], target: Path) -> None:
    """Compile the program, so that others who do the same find it whole or not at all.

    OpenMP is PyTorch's own, already loaded: another one would have threads of its own.
    """
    includes, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    try:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as folder:
            compiled, linked = Path(folder, "mixing.o"), Path(folder, "mixing.so")
            for arguments in (
                [*flags, f"-I{includes}", "-c", SOURCE, "-o", compiled],
                ["-shared", compiled, "-o", linked, f"-L{libraries}", "-ltorch_cpu", "-lc10"],
            ):
                subprocess.run(
                    [*compiler, *arguments], check=True, capture_output=True, text=True,
                    env=os.environ | {"LC_ALL": "C"},
                )  # fmt: skip
            linked.replace(target)
    except OSError as error:
        raise Unavailable(f"{SOURCE.name} could not be compiled: {error}.") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"{compiler[0]} gave {error.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{SOURCE.name} could not be compiled: {said.strip()}") from error


def _agrees() -> bool:
    """Whether the program computes what PyTorch does, in small cases with rims and remainders: of
    narrow maps and of wide ones."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    types = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for size in (5, 9), (3, 33):
            # x, a, kernels, grad: several threads, and several parts of the channels
            shapes = (17, 40, *size), (17, 3), (3, 72, 40, 3, 3), (17, 72, *size)
            numbers = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
            for dtype, allowed in types.items():
                if fits(dtype) and _error(*(n.to(dtype) for n in numbers)) >= allowed:
                    return False
    return True


def _error(x: Tensor, a: Tensor, kernels: Tensor, grad: Tensor) -> float:
    """The largest difference to PyTorch's numbers, of the largest of them; forward and backward."""
    exact = [t.double().requires_grad_() for t in (x, a, kernels)]
    mixed = torch.einsum("bl,loikj->boikj", *exact[1:]).flatten(0, 1)
    groups = F.conv2d(exact[0].flatten(0, 1)[None], mixed, padding="same", groups=len(x))
    x_new = groups.view(grad.shape)
    x_new.backward(grad.double())
    x_new_and_grad = convolved(x, a, kernels), led_back(grad, a, kernels)
    got = (*x_new_and_grad, *gradients(x, grad, a, kernels))
    expected = (x_new, *(numbers.grad for numbers in exact))
    return max(((g - e).abs().max() / e.abs().max()).item() for g, e in zip(got, expected))
