"""The block is the sheet's formula, in every form; the networks are what they say they are."""

import itertools
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.text import Annotation
from torch import nn

from helpers import figures, mixing, model
from helpers.model import (
    BlockNetwork,
    IntermediateBlock,
    OutputBlock,
    WhiteningStem,
    basic_network,
    layer_table,
)

# L, kernel sizes, stride, height and width of the map, gate
SHAPES = [
    (1, 3, 1, (5, 5), "linear"),
    (2, 3, 1, (8, 8), "softmax"),
    (2, (1, 5), 2, (7, 5), "sigmoid"),
    (3, (3, 1, 5), 1, (5, 9), "linear"),
    (3, (5, 3, 3), 2, (6, 6), "softmax"),
    (4, 1, 1, (4, 3), "linear"),
    (4, 1, 2, (5, 5), "sigmoid"),
    (5, (1, 3, 3, 5, 7), 2, (9, 8), "linear"),
    (6, 3, 1, (6, 7), "sigmoid"),
    (7, (3, 1, 3, 1, 3, 5, 3), 2, (5, 6), "softmax"),
    (8, 3, 1, (3, 2), "softmax"),
    (2, (3, 1), 1, (9, 13), "softmax"),
    (8, 3, 2, (1, 1), "sigmoid"),
]
# The compiled form takes only some shapes and numbers: tests/test_mixing.py.
FORMS = tuple(form for form in model.FORMS if form != "compiled")
SUMS = ("fused", "scaled", "products")  # one convolution after the other
FAST = tuple(form for form in FORMS if form != "branches")


def possible(shape, form):
    """Winograd's tiles are for kernels up to 3×3, and they and both products for stride 1."""
    if form == "winograd" and np.max(shape[1]) != 3:
        return False
    return form not in ("winograd", "patches", "products") or shape[2] == 1


CASES = [(shape, form) for shape in SHAPES for form in FORMS if possible(shape, form)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """So few images at a time that batches of 11 are several parts and a rest."""
    for name, numbers in (("KERNELS_AT_ONCE", 4 * 3 * 4 * 9), ("PATCHES_AT_ONCE", 4 * 9 * 4 * 36)):
        monkeypatch.setattr(model, name, dict.fromkeys(("cpu", "cuda"), numbers))
    monkeypatch.setattr(model, "GROUPS_AT_LEAST", 1)
    monkeypatch.setattr(model, "TILES_AT_ONCE", 16)


def block_of(shape, form="auto", dtype=torch.float64, seed=0):
    """A block 3 → 4 channels whose every parameter is random, `fc` too."""
    L, kernel_size, stride, _, gate = shape
    torch.manual_seed(seed)
    block = IntermediateBlock(3, 4, L, kernel_size, stride, gate, form=form).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def random_maps(shape, b=4, channels=3, memory_format=torch.contiguous_format):
    x = torch.randn(b, channels, *shape[3], generator=torch.Generator().manual_seed(1))
    return x.double().to(memory_format=memory_format).requires_grad_()


def formula(block, x):
    """Σ aₗ·Cₗ(x) as the sheet writes it, from unfolded patches: no convolution, no fc module."""
    m = x.flatten(2).sum(2) / x[0, 0].numel()
    a = torch.einsum("bc,lc->bl", m, block.fc.weight) + block.fc.bias
    if block.gate_function == "softmax":
        a = a.exp() / a.exp().sum(1, keepdim=True)
    if block.gate_function == "sigmoid":
        a = 1 / (1 + (-a).exp())
    h, w = (-(-n // block.stride) for n in x.shape[2:])
    total = 0
    for l, branch in enumerate(block.branches):
        out, _, k, _ = branch.weight.shape
        patches = F.unfold(x, k, padding=k // 2, stride=block.stride)  # b×(c·k·k)×(h·w)
        c_x = torch.einsum("of,bfp->bop", branch.weight.reshape(out, -1), patches)
        if branch.bias is not None:
            c_x = c_x + branch.bias[None, :, None]
        total = total + a[:, l, None, None] * c_x
    return total.reshape(len(x), -1, h, w)


def value_and_gradients(function, block, x):
    """x′ and the gradients of a fixed, uneven sum of it: of x and of every parameter by name."""
    x_new = function(x)
    pull = torch.sin(torch.arange(x_new.numel(), dtype=x_new.dtype)).view(x_new.shape)
    names, parameters = zip(*block.named_parameters())
    gradients = torch.autograd.grad((x_new * pull).sum(), [x, *parameters])
    return {"x′": x_new, **dict(zip(["x", *names], gradients))}


def assert_same(measured, expected, **tolerance):
    assert measured.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            measured[name], expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


# ---- the block equals the formula


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "form"), CASES, ids=str)
def test_value_and_gradients_equal_the_formula(shape, form, memory_format):
    for b in (1, 11):
        block, x = block_of(shape, form), random_maps(shape, b, memory_format=memory_format)
        expected = value_and_gradients(lambda x, block=block: formula(block, x), block, x)
        assert len(expected) == 2 + 2 * shape[0] + 2  # x′ and x, kernels and biases, fc
        assert_same(value_and_gradients(block, block, x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "form"), CASES, ids=str)
def test_float32_equals_the_formula_to_rounding(shape, form, memory_format):
    exact, x = block_of(shape, form), random_maps(shape, 11, memory_format=memory_format)
    expected = value_and_gradients(lambda x: formula(exact, x), exact, x)
    block, x32 = block_of(shape, form).float(), x.detach().float().requires_grad_()
    measured = value_and_gradients(block, block, x32)
    for name, value in expected.items():
        largest = value.abs().max().clamp(min=1)
        assert (measured[name] - value).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("c", [32, 128])
def test_winograd_loses_little_more_to_rounding_than_a_plain_convolution(c):
    """Relative to the largest value; on maps like those of the network."""
    torch.manual_seed(0)
    exact = IntermediateBlock(c, c, 2, bias=False, form="branches").double()
    x = torch.randn(16, c, 8, 8).double().requires_grad_()
    expected = value_and_gradients(exact, exact, x)
    lost = {}
    for form in ("branches", "winograd"):
        block = IntermediateBlock(c, c, 2, bias=False, form=form)
        block.load_state_dict(exact.state_dict())
        measured = value_and_gradients(block, block, x.detach().float().requires_grad_())
        lost[form] = {n: (measured[n] - v).abs().max() / v.abs().max() for n, v in expected.items()}
    assert max(lost["winograd"].values()) < 5e-5
    for name, error in lost["winograd"].items():
        assert error < 20 * max(lost["branches"].values()), name


@pytest.mark.parametrize("L", range(1, 9))
def test_forms_agree_without_biases(L):
    torch.manual_seed(L)
    block = IntermediateBlock(5, 6, L, bias=False, form="branches").double()
    nn.init.normal_(block.fc.weight)
    x = random_maps((L, 3, 1, (6, 7), "softmax"), 10, channels=5)
    expected = value_and_gradients(block, block, x)
    for form in FAST:
        block.form = form
        assert_same(value_and_gradients(block, block, x), expected, rtol=1e-9, atol=1e-10)


def test_the_gradient_of_channel_means_is_never_written_out():
    """Nor is it in another memory format than the maps, which would make all that follows slow."""
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    means = model.channel_means(x)
    torch.testing.assert_close(means, x.mean((2, 3)))
    (grad,) = torch.autograd.grad(means[1, 2], x)
    assert grad.stride()[2:] == (0, 0)
    assert float(grad.sum()) == pytest.approx(1)


def gradcheck(function, L, k):
    torch.manual_seed(0)
    x, a = torch.randn(5, 1, 5, 3).double(), torch.randn(5, L).double()
    inputs = [t.requires_grad_() for t in (x, a, torch.randn(L, 2, 1, k, k).double())]
    return torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("k", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_grouped_convolution_passes_gradcheck(k, stride):
    assert gradcheck(lambda *inputs: model._GroupedConvolution.apply(*inputs, stride), 3, k)


@pytest.mark.parametrize(("L", "k"), [(1, 3), (3, 1), (3, 3), (2, 5)])
def test_patch_products_pass_gradcheck(L, k):
    assert gradcheck(model._PatchProducts.apply, L, k)


@pytest.mark.parametrize(("form", "stride"), [*itertools.product(SUMS, [1]), ("scaled", 2)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_sum_of_convolutions_passes_gradcheck(k, form, stride):
    def evaluate(x, a, kernels):
        return model._SumOfConvolutions.apply(x, a, form, stride, *kernels)

    assert gradcheck(evaluate, 3, k)


@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)))
def test_sum_of_convolutions_gives_the_gradients_that_are_asked_for(form, needed):
    """As where x is the images', or a the same for all."""
    torch.manual_seed(0)
    x, a, kernel = torch.randn(2, 3, 4, 4), torch.rand(2, 1), torch.randn(3, 3, 3, 3)
    inputs = [x.requires_grad_(needed[0]), a.requires_grad_(needed[1]), kernel.requires_grad_()]
    expected = a[:, :, None, None] * F.conv2d(x, kernel, padding=1)
    asked = [each for each in inputs if each.requires_grad]
    gradients = torch.autograd.grad((expected**2).sum(), asked)
    value = model._SumOfConvolutions.apply(x, a, form, 1, kernel)
    assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    assert_close(value, expected)
    measured = torch.autograd.grad((value**2).sum(), asked)
    for ours, known in zip(measured, gradients, strict=True):
        assert_close(ours, known)


@pytest.mark.parametrize(("shape", "form"), CASES, ids=str)
def test_gradients_without_that_of_x_are_the_same(shape, form):
    """As in the first block, whose x learns nothing."""
    block, x = block_of(shape, form), random_maps(shape, 11)
    parameters = [p for p in block.parameters() if p.requires_grad]
    target = torch.randn_like(block(x))
    with_x, without = (
        torch.autograd.grad((block(given) * target).sum(), parameters) for given in (x, x.detach())
    )
    torch.testing.assert_close(without, with_x)


def test_mixed_kernels_are_those_of_few_images_but_enough(monkeypatch):
    monkeypatch.setattr(model, "KERNELS_AT_ONCE", {"cpu": 600})
    monkeypatch.setattr(model, "GROUPS_AT_LEAST", 4)
    for numbers, images in ((20, 30), (100, 6), (300, 4)):
        parts = model._grouped_parts(torch.empty(50, 1, 1, 1), torch.empty(2, numbers))
        assert parts[0] == slice(0, images)


@pytest.mark.parametrize("L", [1, 3])
def test_winograd_convolution_passes_gradcheck(L):
    assert gradcheck(model._WinogradConvolution.apply, L, 3)


def test_winograds_matrices_convolve_four_outputs_with_six_products():
    A, B, G = model.winograd_matrices()
    d, w = torch.randn(6).double(), torch.randn(3).double()
    plain = F.conv1d(d[None, None], w[None, None])[0, 0]
    torch.testing.assert_close(A.t() @ ((G @ w) * (B.t() @ d)), plain)


@pytest.mark.parametrize("form", [*SUMS, "grouped", "patches", "winograd"])
def test_fast_forms_refuse_a_second_derivative(form):
    block, x = block_of(SHAPES[1], form), random_maps(SHAPES[1])
    (gradient,) = torch.autograd.grad((block(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", [*SUMS, "grouped", "patches", "winograd"])
def test_nothing_that_grows_with_images_times_branches_is_kept(form):
    """For the backward pass: x, the kernels once more where they are stacked, and small things."""
    b, c, out, L = 64, 16, 16, 4
    block = IntermediateBlock(c, out, L, form=form)
    saved = {}  # by memory, since parameters and views of them are saved more than once

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(torch.randn(b, c, 8, 8))
    x, kernels, small = 4 * b * c * 8 * 8, 4 * L * out * c * 9, 4 * b * (c + 10 * L) + 10_000
    assert max(saved.values()) == x > kernels, "no map, nor a kernel for each image, but x itself"
    assert sum(saved.values()) < x + 2 * kernels + small


# ---- the gate, and the defects of other answers


COMPUTED = ("linear", "softmax", "sigmoid")  # the gates that look at the image


def test_softmax_a_sums_to_one_and_linear_a_can_be_negative():
    for gate in COMPUTED:
        shape = (4, 3, 1, (4, 4), gate)
        a = block_of(shape).gate(random_maps(shape, 50))
        assert a.shape == (50, 4)
        assert (a < 0).any() == (gate == "linear")
        rows_of_one = torch.allclose(a.sum(1), torch.ones(50).double())
        assert rows_of_one == (gate == "softmax")
        assert gate != "sigmoid" or bool(((a > 0) & (a < 1)).all())


@pytest.mark.parametrize("gate", COMPUTED)
@pytest.mark.parametrize("L", [1, 2, 5])
def test_a_starts_at_one_over_L_but_can_leave_it(gate, L):
    shape = (L, 3, 1, (6, 6), gate)
    block, x = IntermediateBlock(3, 4, L, gate=gate).double(), random_maps(shape, 7)
    a = block.gate(x)
    start = 0.5 if gate == "sigmoid" and L == 1 else 1 / L  # a sigmoid never reaches 1
    torch.testing.assert_close(a, torch.full_like(a, start))
    (block(x) ** 2).sum().backward()
    alone = gate == "softmax" and L == 1  # always 1
    assert alone or block.fc.weight.grad.abs().min() > 0, "the branches start alike"


@pytest.mark.parametrize("gate", ["constant", "uniform"])
def test_a_that_does_not_look_at_the_image(gate):
    """The same for all images, at the start and when it has learnt; uniform a never learns."""
    assert set(model.GATES) == {*COMPUTED, "constant", "uniform"}
    block, x = IntermediateBlock(3, 4, 3, gate=gate), torch.randn(5, 3, 6, 6)
    learning = [p for p in block.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (block(x) ** 2).sum().backward()
        optimizer.step()
    a = block.gate(x)
    torch.testing.assert_close(a.sum(dim=1), torch.ones(5))
    assert (a == a[0]).all()
    assert torch.equal(a[0], torch.full((3,), 1 / 3)) == (gate == "uniform")


def test_temperature_divides_what_the_softmax_is_of():
    block, x = IntermediateBlock(3, 4, 2, gate="softmax"), torch.randn(5, 3, 6, 6)
    nn.init.normal_(block.fc.weight)
    cold = block.gate(x)
    block.temperature = 4.0
    warm = block.gate(x)
    torch.testing.assert_close(warm, (cold.log() / 4).softmax(dim=1))


def test_a_weights_branches_not_channels():
    """Were a applied to channels, a one-hot a would not pick exactly one branch."""
    L = 4
    block = IntermediateBlock(3, L, L, gate="linear", form="branches")
    x = torch.randn(5, 3, 6, 6)
    for form, l in itertools.product(FORMS, range(L)):
        block.form = form
        block.fc.bias.data = F.one_hot(torch.tensor(l), L).float()
        torch.testing.assert_close(block(x), block.branches[l](x), rtol=1e-5, atol=1e-5)


def test_each_image_has_its_own_a():
    shape = (3, 3, 1, (6, 6), "softmax")
    x = random_maps(shape, 11)
    for form in FORMS:
        block = block_of(shape, form)
        alone = torch.cat([block(image[None]) for image in x])
        torch.testing.assert_close(block(x), alone)


@pytest.mark.parametrize("L", [1, 2, 5])
def test_every_branch_is_called_once_and_with_the_same_x(L):
    block = IntermediateBlock(3, 3, L, form="branches")  # an output would do as another's input
    received = {l: [] for l in range(L)}
    for l, branch in enumerate(block.branches):
        branch.register_forward_hook(lambda _, inputs, __, l=l: received[l].append(inputs[0]))
    x = torch.randn(2, 3, 5, 5)
    block(x)
    assert [len(inputs) for inputs in received.values()] == [1] * L
    assert all(inputs[0] is x for inputs in received.values())


def test_fc_has_L_units_on_the_channel_means():
    block = block_of((3, 3, 1, (4, 6), "linear"))
    received = []
    block.fc.register_forward_hook(lambda _, inputs, __: received.append(inputs[0]))
    x = random_maps((3, 3, 1, (4, 6), "linear"))
    block(x)
    assert (block.fc.in_features, block.fc.out_features) == (3, 3)
    assert len(received) == 1
    torch.testing.assert_close(
        received[0], torch.stack([x[:, c].mean((1, 2)) for c in range(3)], 1)
    )


def test_branches_are_independent_convolutions():
    block = IntermediateBlock(3, 4, branches=3, kernel_size=(1, 3, 5))
    assert [branch.kernel_size for branch in block.branches] == [(1, 1), (3, 3), (5, 5)]
    assert all(type(branch) is nn.Conv2d for branch in block.branches)
    assert len({branch.weight.data_ptr() for branch in block.branches}) == 3
    start = [branch.weight.flatten()[:12] for branch in block.branches]
    assert not any(torch.equal(p, q) for p, q in itertools.combinations(start, 2))


@pytest.mark.parametrize("gate", ["linear", "softmax"])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "auto"])
def test_every_form_has_gradients_under_autocast(form, gate):
    """As a GPU trains; here on the CPU, whose autocast has the same rules for these operations."""
    torch.manual_seed(0)
    block = IntermediateBlock(8, 8, 2, [3, 3], gate=gate, form=form)
    torch.nn.init.normal_(block.fc.weight)
    x = torch.randn(3, 8, 8, 8, requires_grad=True)
    expected = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_new = block(x)
    torch.testing.assert_close(x_new.float(), expected, rtol=0.05, atol=0.05)
    x_new.float().square().sum().backward()
    for value in (x, *block.parameters()):
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0


# ---- which form


@pytest.fixture(autouse=True)
def rule_of_avx2(monkeypatch):
    """The forms are chosen as on a CPU with AVX2 and without a compiler, whatever is here."""
    monkeypatch.setattr(model, "instructions", lambda: "AVX2")
    monkeypatch.setattr(mixing, "missing", lambda: "There is no C++ compiler.")


def parts_of(size, kernel_size, stride=1, channels=(128, 128)):
    with torch.device("meta"):
        block = IntermediateBlock(*channels, len(kernel_size), kernel_size, stride)
    return block.parts(torch.empty(1, channels[0], size, size))


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "parts"),
    [
        (16, (3, 3, 3, 3), 1, [("grouped", [0, 1, 2, 3])]),
        (32, (3, 3), 2, [("grouped", [0, 1])]),  # 16×16 positions after the stride
        (8, (3, 3, 3, 3), 1, [("winograd", [0, 1, 2, 3])]),  # too few positions for mixing
        (8, (3,) * 8, 1, [("grouped", list(range(8)))]),  # but not for so many branches
        (4, (3,) * 8, 1, [("winograd", list(range(8)))]),
        (4, (3,), 1, [("winograd", [0])]),
        (8, (3, 3), 2, [("fused", [0, 1])]),
        (8, (5, 5), 1, [("fused", [0, 1])]),
        (16, (1, 3, 3), 1, [("winograd", [1, 2]), ("fused", [0])]),  # only two
        (32, (1, 5), 1, [("fused", [0, 1])]),  # the 1×1 branch is hardly a convolution saved
        (8, (1, 3, 3, 5), 1, [("winograd", [1, 2]), ("fused", [0, 3])]),
    ],
)
def test_auto_takes_the_cheapest_forms_by_shapes(size, kernel_size, stride, parts):
    assert parts_of(size, kernel_size, stride) == parts


@pytest.mark.parametrize("channels", [(24, 128), (128, 24), (32, 32)])
def test_auto_takes_winograd_for_many_channels_only(channels):
    plain = "scaled" if channels[0] < channels[1] else "fused"
    assert parts_of(8, (3, 3), channels=channels) == [(plain, [0, 1])]
    assert parts_of(16, (3, 3), channels=channels) == [("grouped", [0, 1])]


@pytest.mark.parametrize(
    ("channels", "stride", "form"),
    [((24, 32), 1, "scaled"), ((32, 32), 1, "fused"), ((24, 32), 2, "fused"),
     ((8, 64), 2, "scaled")],
)  # fmt: skip
def test_auto_multiplies_a_with_the_smaller_of_x_and_what_the_branches_give(channels, stride, form):
    assert parts_of(8, (5, 1), stride, channels) == [(form, [0, 1])]


@pytest.mark.parametrize("channels", [(24, 32), (32, 24)])
def test_auto_evaluates_one_branch_as_written_but_on_a_gpu(channels):
    for precision in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            assert parts_of(8, (3,), channels=channels) == [("branches", [0])]
    on_gpu = SimpleNamespace(shape=torch.Size((1, channels[0], 8, 8)), device=torch.device("cuda"))
    form = "scaled" if channels[0] < channels[1] else "fused"
    assert IntermediateBlock(*channels, 1).parts(on_gpu) == [(form, [0])]


def test_auto_weighs_winograds_price_for_each_branch_against_mixed_kernels():
    wide = (64, 256)
    assert parts_of(16, (3, 3), channels=wide) == [("winograd", [0, 1])]
    assert parts_of(16, (3, 3, 3), channels=wide) == [("grouped", [0, 1, 2])]
    assert parts_of(8, (3, 3, 3), channels=wide) == [("winograd", [0, 1, 2])]


def test_auto_takes_winograd_for_tiles_cut_off_with_two_branches_at_least():
    assert parts_of(6, (3, 1)) == [("fused", [0, 1])]
    assert parts_of(6, (3, 3)) == [("winograd", [0, 1])]
    assert parts_of(12, (3, 1), channels=(256, 256)) == [("winograd", [0]), ("fused", [1])]


def test_auto_takes_products_for_small_maps_of_many_channels_with_amx(monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: "AMX")
    assert parts_of(4, (3, 1), channels=(384, 384)) == [("winograd", [0]), ("fused", [1])]
    assert parts_of(2, (3, 3), channels=(256, 256)) == [("products", [0, 1])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts_of(4, (3, 1)) == [("products", [0, 1])]
        assert parts_of(4, (3, 1), channels=(64, 64)) == [("fused", [0, 1])]
        assert parts_of(6, (3, 1), channels=(256, 256)) == [("fused", [0, 1])]
        assert parts_of(6, (3, 3), channels=(384, 384)) == [("products", [0, 1])]
        assert parts_of(4, (3, 1), stride=2) == [("fused", [0, 1])]


def test_auto_mixes_more_branches_only_where_a_block_widens_with_amx(monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: "AMX")
    for L, form in ((2, "scaled"), (4, "scaled"), (6, "patches")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert parts_of(16, (3,) * L, channels=(32, 64)) == [(form, list(range(L)))]
        assert parts_of(16, (3,) * L, channels=(32, 64)) == [("grouped", list(range(L)))]


def test_auto_takes_winograd_for_fewer_channels_the_more_branches_with_amx(monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: "AMX")
    for L, form in ((1, "branches"), (2, "winograd"), (4, "winograd")):
        assert parts_of(8, (3,) * L, channels=(96, 96)) == [(form, list(range(L)))]
    for L, form in ((1, "branches"), (2, "fused"), (4, "winograd")):
        assert parts_of(8, (3,) * L, channels=(64, 64)) == [(form, list(range(L)))]


def test_images_are_laid_side_by_side_and_back_from_any_part_of_a_batch():
    batch = torch.randn(20, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        part = batch.contiguous(memory_format=layout)[16:]
        beside = model._side_by_side(part)
        assert beside.is_contiguous() and torch.equal(beside, batch[16:].reshape(1, 12, 4, 5))
        filled = torch.zeros_like(batch, memory_format=layout)
        model._back_to_images(beside, filled[16:])
        assert torch.equal(filled[16:], part) and not filled[:16].any()


def test_auto_takes_winograd_with_avx512_for_more_channels_yet(monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: "AVX512")
    assert parts_of(8, (3, 1)) == [("fused", [0, 1])]
    assert parts_of(8, (3, 1), channels=(384, 384)) == [("winograd", [0]), ("fused", [1])]
    assert parts_of(8, (3, 3), channels=(96, 96)) == [("winograd", [0, 1])]  # shared by two
    assert parts_of(16, (3, 3)) == [("winograd", [0, 1])]
    assert parts_of(16, (3, 3, 3, 3)) == [("grouped", [0, 1, 2, 3])]


def test_auto_in_bfloat16_with_amx_mixes_three_kernels_and_never_takes_winograd(monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: "AMX")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts_of(16, (3, 3), channels=(384, 384)) == [("fused", [0, 1])]
        assert parts_of(16, (3, 3, 3)) == [("patches", [0, 1, 2])]
        assert parts_of(32, (3, 3, 3), stride=2) == [("grouped", [0, 1, 2])]
        assert parts_of(8, (3,) * 8) == [("patches", list(range(8)))]
        assert parts_of(8, (3, 3, 3), channels=(384, 384)) == [("fused", [0, 1, 2])]
        assert parts_of(4, (3, 3, 3)) == [("products", [0, 1, 2])]
        assert parts_of(16, (3, 3, 3), stride=2) == [("fused", [0, 1, 2])]


@pytest.mark.parametrize("here", ["AVX512", "AVX2"])  # the latter by the rule of the former
def test_auto_in_bfloat16_elsewhere_mixes_two_kernels_and_on_small_maps_four(here, monkeypatch):
    monkeypatch.setattr(model, "instructions", lambda: here)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert parts_of(16, (3, 1)) == [("fused", [0, 1])]
        assert parts_of(16, (3, 3)) == [("patches", [0, 1])]
        assert parts_of(32, (3, 3), stride=2) == [("grouped", [0, 1])]
        assert parts_of(8, (3, 3, 3)) == [("fused", [0, 1, 2])]
        assert parts_of(8, (3, 3, 3, 3)) == [("patches", [0, 1, 2, 3])]
        assert parts_of(4, (3,) * 8) == [("fused", list(range(8)))]
        assert parts_of(2, (3, 1), channels=(384, 384)) == [("products", [0, 1])]


@pytest.mark.parametrize("form", [*SUMS, "grouped", "patches"])
def test_maps_stay_in_bfloat16_under_autocast(form):
    block = IntermediateBlock(8, 8, 3, bias=False, form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert block(torch.randn(2, 8, 16, 16)).dtype == torch.bfloat16


def test_on_a_gpu_auto_multiplies_the_smaller_numbers_by_a():
    on_gpu = SimpleNamespace(shape=torch.Size((1, 128, 32, 32)), device=torch.device("cuda"))
    assert IntermediateBlock(128, 128, 4).parts(on_gpu) == [("fused", [0, 1, 2, 3])]
    assert IntermediateBlock(128, 256, 2).parts(on_gpu) == [("scaled", [0, 1])]
    assert IntermediateBlock(128, 256, 2, stride=2).parts(on_gpu) == [("fused", [0, 1])]
    for form in set(FORMS) - {"auto"}:
        block = IntermediateBlock(128, 128, 2, form=form)
        assert block.parts(on_gpu) == [(form, [0, 1])]
        for size in (1, 32):
            assert block.parts(torch.empty(1, 128, size, size)) == [(form, [0, 1])]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_formula_as_written_where_nothing_was_measured(form):
    with torch.device("meta"):
        block, x = IntermediateBlock(8, 8, 2, form=form), torch.empty(1, 8, 6, 6)
    assert block.parts(x) == [("branches", [0, 1])]
    assert block(x).shape == x.shape


def test_parts_cover_every_branch_once():
    for sizes in itertools.product((1, 3, 5), repeat=4):
        for size in (2, 8, 32):
            found = [l for _, part in parts_of(size, sizes) for l in part]
            assert sorted(found) == [0, 1, 2, 3]


# ---- output block and stem


@pytest.mark.parametrize("hidden", [(), (7,), (8, 6)])
def test_output_block_is_channel_means_and_all_its_layers(hidden):
    block = OutputBlock(5, 10, hidden)
    x = torch.randn(4, 5, 3, 7)
    linear = [layer for layer in block.fc if isinstance(layer, nn.Linear)]
    assert [fc.out_features for fc in linear] == [*hidden, 10]
    units = torch.stack([x[:, c].mean((1, 2)) for c in range(5)], 1)
    for number, fc in enumerate(linear):
        units = units @ fc.weight.t() + fc.bias
        if number < len(linear) - 1:
            units = units.clamp(min=0)
    assert block(x).shape == (4, 10)
    torch.testing.assert_close(block(x), units)
    block(x).square().sum().backward()
    assert all(fc.weight.grad.abs().sum() > 0 for fc in linear), "a layer is not used"


def test_stem_whitens():
    """Without a regulariser, the outputs on the patches that it was fitted to are uncorrelated."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.randn(3, 3, generator=generator)
    images = torch.einsum("cd,ndhw->nchw", colour, torch.randn(400, 3, 16, 16, generator=generator))
    images = 2 + F.avg_pool2d(images, 3, stride=1, padding=1)  # neighbours are correlated
    stem = WhiteningStem(40)
    stem.regulariser = 0.0
    stem.fit(images)
    outputs = F.conv2d(images, stem.weight, stride=stem.kernel_size)
    first, opposite = outputs.transpose(0, 1).flatten(1).chunk(2)
    torch.testing.assert_close(opposite, -first)
    torch.testing.assert_close(torch.cov(first), torch.eye(20), rtol=0, atol=1e-2)
    patches = F.unfold(images, 4, stride=4).transpose(0, 1).flatten(1)
    assert torch.corrcoef(patches).fill_diagonal_(0).abs().max() > 0.3, "nothing to whiten"


def test_stem_filters_are_fixed_and_come_with_the_weights():
    stem = WhiteningStem(8)
    stem.fit(torch.randn(50, 3, 8, 8))
    assert not list(stem.parameters())
    copy = WhiteningStem(8)
    copy.load_state_dict(stem.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(copy(x), stem(x))
    assert stem(x).shape == (2, 8, 4, 4)


def test_stem_of_stride_one_keeps_the_size():
    assert WhiteningStem(54, stride=1)(torch.randn(2, 3, 8, 8)).shape == (2, 54, 8, 8)
    with pytest.raises(ValueError, match="stem stride=3 is not allowed; use 1 or 2"):
        WhiteningStem(8, stride=3)
    with pytest.raises(ValueError, match=r"filters=56.*even number from 2 to 54"):
        WhiteningStem(56, stride=1)


# ---- networks


def test_basic_network_has_nothing_added():
    network = basic_network()
    containers = (BlockNetwork, IntermediateBlock, OutputBlock, nn.ModuleList, nn.Sequential)
    others = [m for m in network.modules() if not isinstance(m, (*containers, nn.Identity))]
    assert {type(module) for module in others} == {nn.Conv2d, nn.Linear}
    assert all(block.gate_function == "linear" for block in network.blocks)
    assert all(len(block.branches) >= 2 for block in network.blocks)
    linear = sum(type(module) is nn.Linear for module in others)
    assert linear == len(network.blocks) + 1  # one fc a block and one in the output block


def test_basic_network_is_the_formula_block_by_block():
    network = basic_network().double()
    for block in network.blocks:
        nn.init.normal_(block.fc.weight)
    x = images = torch.randn(2, 3, 32, 32).double()
    for block in network.blocks:
        x = formula(block, x)
    fc = network.output.fc[0]
    expected = x.mean((2, 3)) @ fc.weight.t() + fc.bias
    torch.testing.assert_close(network(images), expected)


def test_network_runs_its_layers_in_order_and_each_once():
    network = BlockNetwork([8, 16, 16], branches=2, stem_filters=8, pool_after=[1, 3])
    called = []
    for name, layer in network.named_modules():
        if isinstance(layer, (IntermediateBlock, OutputBlock, nn.BatchNorm2d, nn.MaxPool2d)):
            layer.register_forward_hook(lambda *_, name=name: called.append(name))
    assert network(torch.randn(3, 3, 32, 32)).shape == (3, 10)
    assert called == [
        *("blocks.0", "between.0.0", "between.0.1", "blocks.1", "between.1.0"),
        *("blocks.2", "between.2.0", "between.2.1", "output"),
    ]


def test_a_residual_link_adds_the_input_of_its_block_before_the_activation():
    network = BlockNetwork([8, 8, 8], pool_after=[3], residual=[2]).eval()
    x = torch.randn(2, 3, 16, 16)
    first = network.between[0](network.blocks[0](x), x)
    norm = network.between[1][0]
    expected = nn.functional.silu(norm(network.blocks[1](first)) + first)
    second = network.between[1](network.blocks[1](first), first)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(network.between[0](first, x), network.between[0](first, 0 * x))
    last = network.between[2](network.blocks[2](second), second)
    torch.testing.assert_close(network(x), network.output(last))
    assert [len(a) for a in network.gates(x)] == [2, 2, 2]
    what = layer_table(network, 16)["what"]
    assert what["after B2"] == "batch norm, block's input added, SiLU"
    assert what["after B1"] == "batch norm, SiLU"


def test_gates_are_those_that_the_blocks_use():
    network = BlockNetwork([8, 8], branches=[2, 3], normalise=False).eval()
    used = []
    for block in network.blocks:
        nn.init.normal_(block.fc.weight)
        block.fc.register_forward_hook(lambda _, __, a: used.append(a.softmax(1)))
    x = torch.randn(2, 3, 8, 8)
    network(x)
    gates = network.gates(x)
    assert [a.shape for a in gates] == [(2, 2), (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(gates, used))


def test_branches_and_strides_may_differ_from_block_to_block():
    network = BlockNetwork([4, 4, 4], branches=[1, 2, 3], strides=[2, 1, 2])
    assert [len(block.branches) for block in network.blocks] == [1, 2, 3]
    assert [block.stride for block in network.blocks] == [2, 1, 2]


# ---- wrong arguments

WRONG_BLOCKS = [
    ({"branches": 0}, ["branches=0", "at least 1"]),
    ({"branches": True}, ["branches=True", "integer"]),
    ({"branches": 2.0}, ["branches=2.0", "integer"]),
    ({"in_channels": 0}, ["in_channels=0", "at least 1"]),
    ({"out_channels": -4}, ["out_channels=-4", "at least 1"]),
    ({"stride": 0}, ["stride=0", "at least 1"]),
    ({"kernel_size": 4}, ["kernel_size=4", "even", "1, 3, 5"]),
    ({"kernel_size": (3, 2)}, ["kernel_size=2", "even", "1, 3, 5"]),
    ({"kernel_size": (3, 3, 3)}, ["kernel_size=(3, 3, 3)", "2 branches", "one for each"]),
    ({"kernel_size": 0}, ["kernel_size=0", "at least 1"]),
    ({"kernel_size": 3.0}, ["kernel_size=3.0", "integer"]),
    ({"kernel_size": "3"}, ["kernel_size='3'", "one number"]),
    ({"gate": "relu"}, ["gate='relu'", "linear, softmax, sigmoid"]),
    ({"form": "patches", "stride": 2}, ["form='patches'", "stride=2", "needs 1"]),
    ({"form": "products", "stride": 2}, ["form='products'", "stride=2", "needs 1"]),
    ({"form": "winograd", "stride": 2}, ["form='winograd'", "stride=2", "3×3", "stride 1"]),
    ({"form": "winograd", "kernel_size": 5}, ["form='winograd'", "kernel_size=5", "3×3"]),
    (
        {"form": "fast"},
        ["form='fast'", "auto, branches, fused, products, scaled, grouped, patches, winograd"],
    ),
]
WRONG_NETWORKS = [
    ({"widths": []}, ["widths=[]", "at least one block"]),
    ({"widths": [8, 0]}, ["out_channels=0", "at least 1"]),
    ({"branches": [2, 2, 2]}, ["branches=[2, 2, 2]", "2 blocks", "one for each"]),
    ({"branches": 2.5}, ["branches=2.5", "integer"]),
    ({"strides": [1]}, ["strides=[1]", "2 blocks", "one for each"]),
    ({"strides": [1, 0]}, ["strides=0", "at least 1"]),
    ({"pool_after": [3]}, ["pool_after=[3]", "1 to 2"]),
    ({"pool_after": [0]}, ["pool_after=[0]", "1 to 2"]),
    ({"residual": [3]}, ["residual=[3]", "1 to 2"]),
    ({"residual": [1]}, ["residual=[1]", "block 1", "another shape"]),
    ({"residual": [2], "pool_after": [2]}, ["residual=[2]", "block 2", "another shape"]),
    ({"residual": [2], "strides": [1, 2]}, ["residual=[2]", "block 2", "another shape"]),
    ({"activation": "tanh"}, ["activation='tanh'", "none, relu, gelu, silu"]),
    ({"stem_filters": 5}, ["filters=5", "even number from 2 to 96"]),
    ({"stem_filters": 98}, ["filters=98", "even number from 2 to 96"]),
    ({"stem_filters": "48"}, ["filters='48'", "even number from 2 to 96"]),
    ({"hidden": [0]}, ["hidden=0", "at least 1"]),
    ({"classes": 0}, ["classes=0", "at least 1"]),
]
WRONG_INPUTS = [
    (IntermediateBlock(3, 4), (2, 4, 8, 8), ["x of shape (2, 4, 8, 8)", "b×3×h×w"]),
    (IntermediateBlock(3, 4), (3, 8, 8), ["x of shape (3, 8, 8)", "b×3×h×w"]),
    (OutputBlock(5), (2, 3, 4, 4), ["x of shape (2, 3, 4, 4)", "b×5×h×w"]),
    (WhiteningStem(4), (2, 1, 8, 8), ["x of shape (2, 1, 8, 8)", "b×3×h×w"]),
    (BlockNetwork([4]), (2, 1, 8, 8), ["x of shape (2, 1, 8, 8)", "3 channels"]),
]


def assert_message(raised, words):
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


@pytest.mark.parametrize(("arguments", "words"), WRONG_BLOCKS, ids=str)
def test_wrong_arguments_of_a_block_are_named(arguments, words):
    with pytest.raises(ValueError) as raised:
        IntermediateBlock(**{"in_channels": 3, "out_channels": 4, **arguments})
    assert_message(raised, words)


@pytest.mark.parametrize(("arguments", "words"), WRONG_NETWORKS, ids=str)
def test_wrong_arguments_of_a_network_are_named(arguments, words):
    with pytest.raises(ValueError) as raised:
        BlockNetwork(**{"widths": [8, 8], **arguments})
    assert_message(raised, words)


@pytest.mark.parametrize(("module", "shape", "words"), WRONG_INPUTS, ids=str)
def test_images_of_the_wrong_shape_are_named(module, shape, words):
    with pytest.raises(ValueError) as raised:
        module(torch.zeros(shape))
    assert_message(raised, words)


# ---- what it costs


def test_layer_table_equals_counts_by_hand():
    network = BlockNetwork(
        [4, 6], branches=[2, 3], kernel_size=1, strides=[1, 2], stem_filters=2, pool_after=[1],
        hidden=(5,), normalise=True, activation="relu", form="branches",
    )  # fmt: skip
    table = layer_table(network, image_size=16)
    assert list(table.index) == ["stem", "B1", "after B1", "B2", "after B2", "output"]
    assert list(table["output"]) == ["2×8×8", "4×8×8", "4×4×4", "6×2×2", "6×2×2", "10"]
    assert list(table["parameters"]) == [
        0,  # the stem does not learn
        2 * 2 * 4 + (2 * 2 + 2),  # two 1×1 kernels without biases, fc
        4,  # batch norm learns its biases only
        3 * 4 * 6 + (4 * 3 + 3),
        6,
        (6 * 5 + 5) + (5 * 10 + 10),
    ]
    written = [
        2 * 3 * 16 * 64,  # 4×4 patches of 3 channels at 8×8 positions
        2 * (2 * 4) * 64 + 2 * 2 + 2 * 4 * 64,  # convolutions, fc, weighted sum
        0,
        3 * (4 * 6) * 4 + 4 * 3 + 3 * 6 * 4,
        0,
        6 * 5 + 5 * 10,
    ]
    assert list(table["multiply-adds as written"]) == written
    assert list(table["multiply-adds as evaluated"]) == written
    assert list(table["form"]) == ["", "branches", "", "branches", "", ""]


@pytest.mark.parametrize("form", ["grouped", "patches"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_table_counts_the_mixing_of_kernels(bias, form):
    network = BlockNetwork(
        [5], 2, kernel_size=(1, 3), gate="linear", normalise=not bias, activation="none",
        form=form,
    )  # fmt: skip
    row = layer_table(network, image_size=4).loc["B1"]
    gate = 3 * 2
    assert row["parameters"] == 3 * 5 * (1 + 9) + bias * 2 * 5 + gate + 2
    assert row["multiply-adds as written"] == 3 * 5 * (1 + 9) * 16 + gate + 2 * 5 * 16
    mixing = 2 * 3 * 5 * 9  # the 1×1 kernel is padded to 3×3
    assert row["multiply-adds as evaluated"] == mixing + 3 * 5 * 9 * 16 + gate


@pytest.mark.parametrize("form", ["fused", "products", "scaled"])
@pytest.mark.parametrize("gate", ["softmax", "constant", "uniform"])
def test_layer_table_counts_the_forms_without_mixing(form, gate):
    """Biases count none, and an a that does not look at the image has no fully connected layer."""
    network = BlockNetwork(
        [5], 2, kernel_size=(1, 3), gate=gate, normalise=False, activation="none", form=form
    )
    row = layer_table(network, image_size=4).loc["B1"]
    own = 3 * 2 if gate == "softmax" else 0
    weighting = 2 * (3 if form == "scaled" else 5) * 16
    assert row["multiply-adds as evaluated"] == 3 * 5 * (1 + 9) * 16 + own + weighting
    assert row["multiply-adds as written"] == 3 * 5 * (1 + 9) * 16 + own + 2 * 5 * 16


def test_layer_table_counts_winograds_products_and_transforms():
    network = BlockNetwork([5], 2, gate="linear", activation="none", form="winograd")
    row = layer_table(network, image_size=6).loc["B1"]
    tiles, transforms = 4, 36 * 36 * 3 + 16 * 36 * 5
    weights_and_products = 36 * 2 * 3 + 36 * 2 * 3 * 5
    assert row["multiply-adds as evaluated"] == tiles * (transforms + weights_and_products) + 3 * 2


def test_layer_table_leaves_the_network_as_it_was():
    network = BlockNetwork([4, 4], stem_filters=4).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    table = layer_table(network)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    learned = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert table["parameters"].sum() == learned


@pytest.mark.parametrize(
    "arguments",
    [
        {"widths": [8]},
        {"widths": [8, 16, 24], "stem_filters": 12, "pool_after": [1, 2]},
        {"widths": [32, 8, 64, 16], "strides": [2, 1, 1, 2], "pool_after": [4]},
        {"widths": [8, 8], "normalise": False, "activation": "none"},
        {"widths": [8, 8, 8], "residual": [2, 3]},
    ],
    ids=str,
)
def test_network_diagram_states_every_shape_and_every_way_around(arguments):
    network = BlockNetwork(**arguments)
    (axes,) = figures.network_diagram(network).axes
    written = [text.get_text() for text in axes.texts]
    arrows = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(arrows) == 1 + len(arguments.get("residual", []))  # the axis is one, too
    table = layer_table(network)
    assert not plt.get_fignums()
    for name, output in table["output"].items():
        channels, _, size = output.partition("×")
        assert size in written or name == "output"
        assert name in written or name.startswith("after")
        assert channels in written
