"""The extension is the formula, is taken only where it can work, and is never trusted unseen."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from helpers import mixing

reason = mixing.unavailable()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason or "it is available")
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest number of each tensor


def reference(x, a, weights, biases=None):
    biases = biases or [None] * len(weights)
    maps = [F.conv2d(x, w, b, padding=w.shape[-1] // 2) for w, b in zip(weights, biases)]
    return sum(a[:, l, None, None, None] * y for l, y in enumerate(maps))


def arguments(b, c, out, size, kernels, dtype=torch.float32):
    """x, a, weights and biases: float64 numbers that `dtype` has too."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, c, *size), (b, len(kernels)), *((out, c, k, k) for k in kernels)]
    shapes += len(kernels) * [(out,)]
    return [torch.randn(s, generator=generator).to(dtype).double() for s in shapes]


def value_and_gradients(mix, numbers, L, grad):
    numbers = [n.requires_grad_() for n in numbers]
    y = mix(*numbers[:2], numbers[2 : 2 + L], numbers[2 + L :])
    return y, *torch.autograd.grad(y, numbers, grad.to(y.dtype))


@pytest.mark.parametrize("dtype", mixing.DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("b", "c", "out", "size", "kernels"),
    [
        (11, 24, 32, (16, 16), (3, 1)), (17, 64, 128, (8, 8), (3, 1)), (9, 8, 8, (32, 32), (3,)),
        (5, 40, 72, (5, 7), (1, 5, 3)), (12, 128, 128, (4, 4), 4 * (3,)), (1, 16, 8, (1, 1), (3, 1)),
        (4, 512, 8, (2, 3), (3,)), (70, 16, 24, (6, 4), (3, 1, 3, 1, 3, 3, 1, 3)),
        (0, 8, 16, (4, 4), (3, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_values_and_gradients(b, c, out, size, kernels, memory_format, dtype):
    L, numbers = len(kernels), arguments(b, c, out, size, kernels, dtype)
    grad = torch.linspace(-1, 2, b * out * size[0] * size[1]).view(b, out, *size).to(dtype)
    expected = value_and_gradients(reference, numbers, L, grad)
    given = [n.detach().float() for n in numbers]
    given = [n.to(memory_format=memory_format) if n.dim() == 4 else n for n in given]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = value_and_gradients(mixing.mixed_convolution, given, L, grad)
    assert got[0].dtype == dtype
    for ours, exact in zip(got, expected, strict=True):
        assert ours.shape == exact.shape
        if exact.numel():
            assert (ours - exact).abs().max() < ERROR[dtype] * exact.abs().max()


def test_an_image_is_the_same_alone_and_in_a_batch():
    x, a, *weights = (n.float() for n in arguments(7, 16, 24, (6, 6), (3, 1))[:4])
    alone = [mixing.mixed_convolution(x[i : i + 1], a[i : i + 1], weights) for i in range(7)]
    assert torch.equal(mixing.mixed_convolution(x, a, weights), torch.cat(alone))


def test_kernel_gradients_keep_the_digits_of_float32_under_autocast():
    if torch.bfloat16 not in mixing.DTYPES:
        pytest.skip("no bfloat16 here")
    x, a, w = (n.float().requires_grad_() for n in arguments(9, 16, 8, (4, 4), (3,))[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixing.mixed_convolution(x, a, [w])
    y.float().square().sum().backward()
    assert not torch.equal(w.grad, w.grad.bfloat16().float())


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.ones(2, 16, 8, 8)), dict(x=torch.ones(8, 8, 8)), dict(a=torch.ones(2, 3)),
        dict(x=torch.ones(2, 8, 8, 8).double()), dict(x=torch.ones(2, 8, 8, 8, device="meta")),
        dict(weights=[torch.ones(8, 8, 3, 3), torch.ones(16, 8, 1, 1)]),
        dict(weights=[torch.ones(8, 8, 3, 3), torch.ones(8, 8, 2, 2)]),
        dict(weights=[torch.ones(8, 8, 3, 3), torch.ones(8, 8, 3, 1)]),
        dict(weights=[torch.ones(8, 8, 3, 3), torch.ones(8, 8, 1, 1).double()]),
        dict(x=torch.ones(2, 12, 8, 8), weights=2 * [torch.ones(8, 12, 3, 3)]),
        dict(x=torch.ones(2, 8, 8, 8).half(), weights=2 * [torch.ones(8, 8, 3, 3).half()]),
    ],
    ids=lambda change: " ".join(change),
)  # fmt: skip
def test_what_it_does_not_take_is_refused(change):
    given = dict(x=torch.ones(2, 8, 8, 8), a=torch.ones(2, 2), weights=2 * [torch.ones(8, 8, 3, 3)])
    assert mixing.pays(given["x"], given["weights"], stride=1)
    given |= change
    assert "a" in change or not mixing.pays(given["x"], given["weights"], stride=1)
    with pytest.raises(mixing.Unavailable, match="takes float32"):
        mixing.mixed_convolution(**given)


def test_it_pays_where_seven_positions_of_the_largest_kernel_are_saved():
    for size, kernels, stride, pays in [
        (8, (3, 1), 1, True), (7, (3, 1), 1, False), (3, (3, 3), 1, True), (2, (3, 3), 1, False),
        (32, (3,), 1, False), (32, (3, 3), 2, False), (4, (3, 3, 3, 3), 1, True),
    ]:  # fmt: skip
        weights = [torch.ones(8, 8, k, k) for k in kernels]
        assert mixing.pays(torch.ones(1, 8, size, size), weights, stride) == pays, (size, kernels)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (3, 1))
        self.taken = []

    def forward(self, x):
        a, weights = x.mean((2, 3))[:, :2], [branch.weight for branch in self.branches]
        self.taken.append(mixing.pays(x, weights, 1))
        return (mixing.mixed_convolution if self.taken[-1] else reference)(x, a, weights)


def test_nothing_that_traces_or_transforms_meets_it():
    block, x = Block(), torch.randn(2, 8, 8, 8)
    expected = block(x)
    assert block.taken == [True]
    functions = [torch.jit.trace(block, x, check_trace=False), torch.export.export(block, (x,)).module()]
    assert all(torch.allclose(function(x), expected, atol=1e-5) for function in functions)
    torch.func.grad(lambda x: block(x).sum())(x)
    torch.func.grad(lambda w: torch.func.functional_call(block, w, x).sum())(dict(block.named_parameters()))
    torch.func.vmap(block)(x[None])
    torch.func.jvp(block, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        block(torch.autograd.forward_ad.make_dual(x, x))
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert counter.get_total_flops() == 2 * 2 * 64 * 64 * (9 + 1)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        block(mode.from_tensor(x))
    block.to("meta")(x.to("meta"))
    assert not any(block.taken[1:]) and len(block.taken) > 8


def said(folder, **environment):
    """What another process says of the extension in a folder, and that it ends well."""
    code = (
        "import sys; from pathlib import Path; from helpers import mixing; "
        "mixing.BUILD = Path(sys.argv[1]); print(mixing.unavailable())"
    )
    environment = os.environ | {"PYTHONPATH": str(mixing.SOURCE.parent.parent)} | environment
    return subprocess.run(
        [sys.executable, "-c", code, folder], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize(("compiler", "name"), [(" ", "' '"), ("none -m64", "'none -m64'")])
def test_without_a_compiler_that_is_said(tmp_path, compiler, name):
    assert said(tmp_path, CXX=compiler) == f"mixing.cpp cannot be used: there is no C++ compiler {name}."


def test_without_avx512_that_is_said(tmp_path):
    assert "AVX2" in said(tmp_path, ATEN_CPU_CAPABILITY="avx2")


def test_a_damaged_file_is_compiled_again_and_not_loaded(tmp_path):
    for path in mixing.BUILD.glob("mixing-*.so"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[:30_000])
    assert "no C++ compiler" in said(tmp_path, CXX=" ")
    assert said(tmp_path) == ""
    assert said(tmp_path, CXX=" ") == "", "it is there, and whole"


def test_wrong_results_are_not_trusted(tmp_path, monkeypatch):
    source = mixing.SOURCE.read_text(encoding="utf-8")
    wrong = source.replace("grad_a[j * L + l] +=", "grad_a[j * L + l] -=")
    assert wrong != source
    (tmp_path / "mixing.cpp").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(mixing, "SOURCE", tmp_path / "mixing.cpp")
    monkeypatch.setattr(mixing, "BUILD", tmp_path)
    monkeypatch.setattr(mixing, "_extension", mixing._extension.__wrapped__)
    assert mixing.unavailable.__wrapped__() == "mixing.cpp was compiled, but gives wrong results."
