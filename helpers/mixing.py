"""x′ = (Σ aₗ·Wₗ)∗x with kernels mixed image by image in a core's cache: `mixing.cpp` as a function.

The extension is compiled once, in a few seconds, into `build/`; this takes g++ 12 or newer and a
CPU with AVX-512. Without them blocks evaluate the reference, and `unavailable` says why.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from helpers.project import ROOT

SOURCE, BUILD = Path(__file__).with_suffix(".cpp"), ROOT / "build"
COMPILE = """CXX=${CXX:-g++}; FLAGS="-O3 -march=x86-64-v4 -mavx512bf16 -std=gnu++20 -fopenmp -fPIC"
[ "$(command -v $CXX)" ] || { echo "there is no C++ compiler '$CXX'" >&2; exit 1; }
$CXX $FLAGS -I"$TORCH/include" -c "$SOURCE" -o mixing.o
$CXX -shared mixing.o -L"$TORCH/lib" -ltorch_cpu -lc10 -o mixing.so  # OpenMP is PyTorch's"""
SAVED_POSITIONS = 7  # mixing pays where it saves the multiply-adds of so many positions
HALF = torch.cpu.get_capabilities().get("avx512_bf16", False)
DTYPES = (torch.float32, torch.bfloat16) if HALF else (torch.float32,)


class Unavailable(RuntimeError):
    """The extension cannot be used here, or not with what it was given."""


@cache
def unavailable() -> str:
    """Why the extension cannot be used on this machine, in one sentence; empty if it can."""
    try:
        _extension()
        return ""
    except Exception as error:  # whatever it is, the reference still works
        failed = isinstance(error, subprocess.CalledProcessError)
        reason = error.stderr or "the compiler failed" if failed else str(error) or repr(error)
        return f"{SOURCE.name} cannot be used: {' '.join(reason.split())[:200].rstrip('.')}."


def is_faster(x: Tensor, weights: Sequence[Tensor], stride: int) -> bool:
    """Whether the extension takes maps x, b×c×h×w, and these kernels, and is quicker.

    Never while something traces, counts or transforms operations: it would not see the extension.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if traced or transformed or forward_ad._current_level >= 0:
        return False
    areas = [w.shape[-1] ** 2 for w in weights]
    saved = (sum(areas) / max(areas) - 1) * x.shape[-2:].numel()
    quicker = stride == 1 and saved >= SAVED_POSITIONS
    return quicker and _computing_dtype(x, weights) is not None and not unavailable()


def mixed_convolution(
    x: Tensor, a: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None
) -> Tensor:
    """Σ aₗ·(Wₗ∗x + bₗ) of stride 1, b×out×h×w, in autocast's dtype; differentiable once.

    x is b×c×h×w, a b×L; the L weights are out×c×k×k, each with its own odd k, the biases `out`.
    Raises `Unavailable` if the extension cannot be used here, or not with these.
    """
    dtype = _computing_dtype(x, weights)
    if dtype is None or a.shape != (len(x), len(weights)) or a.device != x.device:
        raise Unavailable(
            f"{SOURCE.name} takes float32 (or bfloat16) on the CPU, odd kernels, and channels in "
            f"multiples of 8; not x {[*x.shape]} of {x.dtype} on {x.device} with a {[*a.shape]}."
        )
    if unavailable():
        raise Unavailable(unavailable())
    k = max(w.shape[-1] for w in weights)
    margins = [(k - w.shape[-1]) // 2 for w in weights]
    padded = [F.pad(w, 4 * (m,)) if m else w for w, m in zip(weights, margins)]  # all k×k
    y = _MixedConvolution.apply(x.to(dtype), a.to(dtype), *padded)
    return y if biases is None else y + (a @ torch.stack([*biases])).to(dtype)[:, :, None, None]


class _MixedConvolution(torch.autograd.Function):
    """With kernels of one size. Only the arguments are kept; the backward pass mixes again."""

    @staticmethod
    def forward(ctx, x, a, *weights):
        ctx.save_for_backward(x, a, *weights)
        return _convolve(x, a, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, a, *weights = ctx.saved_tensors
        grad_x = _convolve(grad, a, weights, turned=True) if ctx.needs_input_grad[0] else None
        if x.shape[-1] % (4 // x.itemsize):  # bfloat16 positions are taken in pairs
            x, grad = F.pad(x, (0, 1)), F.pad(grad, (0, 1))
        # One buffer of gradients per thread; fewer for under 8 images each, or above 2³⁰ bytes.
        L, (out, c, k, _) = len(weights), weights[0].shape
        copies = min(torch.get_num_threads(), len(x) // 8, 2**28 // (L * weights[0].numel()))
        grads = x.new_zeros(max(copies, 1), L, out, k, k, c, dtype=torch.float32)
        grad_a = x.new_zeros(a.shape, dtype=torch.float32)
        _run(weights, x, grad, a.float(), grads, grad_a, copies=len(grads))
        return grad_x, grad_a.to(a.dtype), *grads.sum(0).movedim(-1, 2)


def _convolve(x: Tensor, a: Tensor, weights: Sequence[Tensor], turned: bool = False) -> Tensor:
    size = len(x), weights[0].shape[turned], *x.shape[2:]
    y = torch.empty(size, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    a = F.pad(a, (0, len(weights) % (4 // a.itemsize)))  # bfloat16 branches are taken in pairs
    _run(weights, x, y, a, turned=turned)
    return y


def _run(weights: Sequence[Tensor], *arrays: Tensor, turned: bool = False, copies: int = 0) -> None:
    """The extension's `convolve` of x, y and a; or `gradients`, if there are copies of them."""
    x, y, *_ = arrays
    (b, c, h, w), half = x.shape, x.dtype == torch.bfloat16
    shape = b, h, w, c, y.shape[1], weights[0].shape[-1], len(weights), half, turned, copies
    arrays = *(weight.to(x.dtype) for weight in weights), *arrays
    arrays = [t.movedim(1, -1).contiguous() if t.dim() == 4 else t.contiguous() for t in arrays]
    pointers = (ctypes.c_void_p * len(arrays))(*(t.data_ptr() for t in arrays))
    if _extension()((ctypes.c_int64 * len(shape))(*shape), pointers):
        raise Unavailable(f"{SOURCE.name} ran out of memory, or oneDNN failed.")


def _computing_dtype(x: Tensor, weights: Sequence[Tensor]) -> torch.dtype | None:
    """In which dtype the extension computes with these; None if it does not take them."""
    autocast, (out, c) = torch.is_autocast_enabled("cpu"), weights[0].shape[:2]
    dtype = torch.get_autocast_dtype("cpu") if autocast else weights[0].dtype
    fits = dtype in DTYPES and x.shape[1:-2] == (c,) and c % 8 == out % 8 == 0
    fits &= all(w.shape == (out, c, *2 * (w.shape[-1] | 1,)) for w in weights)
    for t in (x, *weights):
        fits &= t.device.type == "cpu" and type(t) in (Tensor, nn.Parameter)
        fits &= t.dtype in (DTYPES if autocast else [dtype])
    return dtype if fits else None


@cache
def _extension() -> Callable[..., int]:
    """Its function. The file's name ends in its checksum: if damaged, it is compiled again."""
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX512":
        raise Unavailable(f"PyTorch uses {capability} here, and it needs AVX512")
    names = {"SOURCE": str(SOURCE), "TORCH": str(Path(torch.__file__).parent)}
    made_of = f"{SOURCE.read_bytes()}{COMPILE}{names}{torch.__version__}".encode()
    name = f"mixing-{sha256(made_of).hexdigest()[:12]}-"
    for path in BUILD.glob(f"{name}*.so"):
        if path.is_file() and path.stem == name + sha256(path.read_bytes()).hexdigest()[:12]:
            return ctypes.CDLL(str(path)).run
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:  # so that no process finds half a file
        subprocess.run(
            ["sh", "-ec", COMPILE], cwd=folder, env=os.environ | names, check=True,
            capture_output=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        path = Path(folder, "mixing.so")
        name += sha256(path.read_bytes()).hexdigest()[:12]
        return ctypes.CDLL(str(path.replace(BUILD / f"{name}.so"))).run
