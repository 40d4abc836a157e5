"""The extension is the formula, is taken only where it can work, and is never trusted unseen."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from helpers import mixing

reason = mixing.unavailable()  # skipped where the machine lacks something, not where it is broken
lacking = "not with AVX512" in reason or "no C++ compiler" in reason
pytestmark = pytest.mark.skipif(lacking, reason=reason or "it is available")
ERROR = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number of each tensor


def reference(x, a, weights, biases=()):
    maps = [F.conv2d(x, w, padding=w.shape[-1] // 2) for w in weights]
    maps = [y + bias[:, None, None] for y, bias in zip(maps, biases)] or maps
    return sum(a[:, l, None, None, None] * y for l, y in enumerate(maps))


def value_and_gradients(mix, numbers, L, grad):
    """Of a function of x, a, weights and biases."""
    numbers = [n.detach().requires_grad_() for n in numbers]
    y = mix(*numbers[:2], numbers[2 : 2 + L], numbers[2 + L :])
    return y, *torch.autograd.grad(y, numbers, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", mixing.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("b", "c", "out", "h", "w", "kernels"),
    [
        (11, 24, 32, 16, 16, (3, 1)), (17, 64, 128, 8, 8, (3, 1)), (9, 8, 8, 32, 32, (3,)),
        (5, 40, 72, 5, 7, (1, 5, 3)), (12, 128, 128, 4, 4, (3, 3, 3, 3)), (1, 16, 8, 1, 1, (3, 1)),
        (4, 512, 8, 2, 3, (1,)), (70, 16, 24, 6, 4, 4 * (3, 1)), (0, 8, 8, 4, 4, (3,)),
    ],
)  # fmt: skip
def test_values_and_gradients(b, c, out, h, w, kernels, memory_format, dtype):
    L = len(kernels)
    shapes = (b, c, h, w), (b, L), *((out, c, k, k) for k in kernels), *L * [(out,)]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(s, generator=generator).to(dtype).float() for s in shapes]
    grad = torch.linspace(-1, 2, b * out * h * w).view(b, out, h, w).to(dtype)
    expected = value_and_gradients(reference, [n.double() for n in given], L, grad)
    given = [n.to(memory_format=memory_format) if n.dim() == 4 else n for n in given]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = value_and_gradients(mixing.mixed_convolution, given, L, grad)
    assert got[0].dtype == dtype and {g.dtype for g in got[1:]} == {torch.float32}
    for ours, exact in zip(got, expected, strict=True):
        assert ours.shape == exact.shape
        if exact.numel():
            assert (ours - exact).abs().max() <= ERROR[dtype] * exact.abs().max()
    rounded = [torch.equal(g, g.bfloat16().float()) for g in got[3 : 3 + L]]
    assert b == 0 or not any(rounded), "kernels' gradients have the digits of float32 in any case"


ones = torch.ones
X, W = ones(2, 8, 8, 8), ones(8, 8, 3, 3)


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (ones(2, 16, 8, 8), [W, W]), (X[0], [W, W]), (X.double(), [W, W]), (X.to("meta"), [W, W]),
        (X, [W, ones(16, 8, 1, 1)]), (X, [W, ones(8, 8, 2, 2)]), (X, [W, ones(8, 8, 3, 1)]),
        (X, [W, W.double()]), (X.half(), [W.half(), W.half()]),
        (ones(2, 12, 8, 8), 2 * [ones(8, 12, 3, 3)]), (X, 2 * [ones(12, 8, 3, 3)]),
    ],
)  # fmt: skip
def test_what_it_does_not_take_is_refused(x, weights):
    assert mixing.is_faster(X, [W, W], stride=1) and not mixing.is_faster(x, weights, stride=1)
    with pytest.raises(mixing.Unavailable, match="takes float32"):
        mixing.mixed_convolution(x, ones(2, 2), weights)
    with pytest.raises(mixing.Unavailable, match=r"a \[2, 3\]"):
        mixing.mixed_convolution(X, ones(2, 3), [W, W])


def test_it_pays_where_seven_positions_of_the_largest_kernel_are_saved():
    for size, kernels, stride, pays in [
        (8, (3, 1), 1, True), (7, (3, 1), 1, False), (3, (3, 3), 1, True), (2, (3, 3), 1, False),
        (32, (3,), 1, False), (32, (3, 3), 2, False),
    ]:  # fmt: skip
        weights = [ones(8, 8, k, k) for k in kernels]
        assert mixing.is_faster(ones(1, 8, size, size), weights, stride) == pays, (size, kernels)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches, self.taken = nn.ModuleList(nn.Conv2d(8, 8, k) for k in (3, 1)), []

    def forward(self, x):
        weights = [branch.weight for branch in self.branches]
        self.taken.append(mixing.is_faster(x, weights, 1))
        mix = mixing.mixed_convolution if self.taken[-1] else reference
        return mix(x, x.mean((2, 3))[:, :2], weights)


def test_nothing_that_traces_or_transforms_meets_it():
    block, x = Block(), torch.randn(2, 8, 8, 8)
    expected = block(x)
    traced = torch.jit.trace(block, x, check_trace=False), torch.export.export(block, (x,)).module()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert all(torch.allclose(f(x), expected, atol=1e-5) for f in (*traced, compiled))
    call = torch.func.functional_call
    torch.func.grad(lambda w: call(block, w, x).sum())(dict(block.named_parameters()))
    torch.func.vmap(block)(x[None])
    torch.func.jvp(block, (x,), (x,))
    with forward_ad.dual_level():
        block(forward_ad.make_dual(x, x))
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * 2 * 64 * 64 * (9 + 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        block(mode.from_tensor(x))
    block.to("meta")(x.to("meta"))
    assert block.taken[0] and not any(block.taken[1:]) and len(block.taken) > 8


def said(folder, **environment):
    """What another process says of the extension in a folder, if it ends well."""
    code = (
        "import sys; from pathlib import Path; from helpers import mixing; "
        "mixing.BUILD = Path(sys.argv[1]); print(mixing.unavailable())"
    )
    environment = os.environ | {"PYTHONPATH": str(mixing.SOURCE.parent.parent)} | environment
    command = [sys.executable, "-c", code, folder]
    return subprocess.check_output(command, env=environment, text=True).strip()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("CXX", " ", "there is no C++ compiler ' '"),
        ("CXX", "none -m64", "there is no C++ compiler 'none -m64'"),
        ("ATEN_CPU_CAPABILITY", "avx2", "PyTorch uses AVX2 here, and it needs AVX512"),
    ],
)
def test_what_is_missing_is_said(tmp_path, variable, value, reason):
    assert said(tmp_path, **{variable: value}) == f"mixing.cpp cannot be used: {reason}."


def test_a_damaged_file_is_compiled_again_and_not_loaded(tmp_path):
    for path in mixing.BUILD.glob("mixing-*.so"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:30_000])
    assert "no C++ compiler" in said(tmp_path, CXX=" ")
    assert said(tmp_path) == "" == said(tmp_path, CXX=" "), "compiled, then there"
