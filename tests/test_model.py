"""The blocks compute the sheet's formula; the five defects found in other answers do not occur."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.signal import correlate
from torch import nn

from helpers import mixing
from helpers.model import (
    GATES,
    BlockNetwork,
    IntermediateBlock,
    OutputBlock,
    WhiteningStem,
    basic_network,
    layer_table,
)

ROWS = [
    {"channels": 8, "kernels": [3, 1], "pool": True},
    {"channels": 8, "kernels": [5, 3, 1], "residual": True, "gate": "softmax"},
    {"channels": 16, "kernels": [3], "stride": 2},
]
SHAPES = [  # b, c, c′, h, w, kernels, stride
    (2, 3, 8, 9, 7, (3,), 1),
    (3, 8, 8, 8, 8, (3, 1), 1),
    (1, 8, 16, 5, 6, (1, 3, 5), 1),
    (2, 16, 8, 4, 4, (3, 3, 3, 3), 1),
    (2, 8, 8, 1, 1, (3, 1), 1),
    (2, 5, 7, 8, 8, (3, 1), 2),
    (2, 8, 8, 7, 7, (7, 1), 2),
    (2, 8, 16, 6, 6, (3,) * 8, 1),
]


LAYOUTS = (torch.channels_last, torch.contiguous_format)


def block_and_input(shape: tuple, gate: str = "linear", seed: int = 0) -> tuple:
    """A block with random gate weights, in float64, and an x."""
    b, c, out, h, w, kernels, stride = shape
    torch.manual_seed(seed)
    block = IntermediateBlock(c, out, kernels, stride, gate, implementation="reference").double()
    nn.init.normal_(block.fc.weight)
    nn.init.normal_(block.fc.bias)
    return block, torch.randn(b, c, h, w, dtype=torch.float64, requires_grad=True)


def by_hand(block: IntermediateBlock, x: np.ndarray) -> np.ndarray:
    """The formula in NumPy and SciPy, image by image, branch by branch, channel by channel."""
    weights, bias = block.fc.weight.detach().numpy(), block.fc.bias.detach().numpy()
    images = []
    for image in x:
        a = weights @ image.mean(axis=(1, 2)) + bias
        total = 0.0
        for a_l, C in zip(a, block.branches, strict=True):
            W, bias_l = C.weight.detach().numpy(), C.bias.detach().numpy()
            r = C.kernel_size[0] // 2
            padded = np.pad(image, ((0, 0), (r, r), (r, r)))
            maps = [correlate(padded, kernel, mode="valid")[0] for kernel in W]
            maps = np.stack(maps)[:, :: block.stride, :: block.stride]
            total = total + a_l * (maps + bias_l[:, None, None])
        images.append(total)
    return np.stack(images)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_formula_in_values_and_gradients(shape: tuple) -> None:
    block, x = block_and_input(shape)
    x_new = block(x)
    assert np.allclose(x_new.detach().numpy(), by_hand(block, x.detach().numpy()), atol=1e-10)
    # The gradients along a random direction of all inputs and weights, by central differences.
    variables = [x, *block.parameters()]
    direction = [torch.randn_like(v) for v in variables]
    out = torch.randn_like(x_new)
    grads = torch.autograd.grad(x_new, variables, out)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for v, d in zip(variables, direction, strict=True):
                v += sign * 1e-6 * d
            values.append(by_hand(block, x.detach().numpy()))
            for v, d in zip(variables, direction, strict=True):
                v -= sign * 1e-6 * d
    numerical = ((values[0] - values[1]) * out.numpy()).sum() / 2e-6
    assert float(slope) == pytest.approx(numerical, rel=1e-5)


@pytest.mark.skipif(bool(mixing.unavailable()), reason="the C++ extension is not available here")
@pytest.mark.parametrize(
    ("kernels", "layout"),
    [*itertools.product([(3,), (3, 1), (1, 3, 5), (3,) * 8], LAYOUTS)],
)
def test_mixed_and_reference_agree(kernels: tuple, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    block = IntermediateBlock(16, 24, kernels)
    nn.init.normal_(block.fc.weight)
    x = torch.randn(9, 16, 8, 8).contiguous(memory_format=layout).requires_grad_()
    found = {}
    for block.implementation in ("reference", "mixed", "auto"):
        x_new = block(x)
        grad = torch.linspace(-1, 1, x_new.numel()).view(x_new.shape)
        found[block.implementation] = [
            x_new, *torch.autograd.grad(x_new, [x, *block.parameters()], grad)
        ]  # fmt: skip
    for name in ("mixed", "auto"):
        for one, other in zip(found[name], found["reference"], strict=True):
            assert torch.allclose(one, other, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("gate", GATES)
def test_every_a_starts_at_one_over_L_and_is_b_by_L(gate: str) -> None:
    block = IntermediateBlock(6, 4, (3, 3, 1), gate=gate)
    a = block.gate(torch.randn(5, 6, 8, 8))
    assert a.shape == (5, 3)
    assert torch.allclose(a, torch.full_like(a, 1 / 3))


def test_a_is_computed_from_the_channel_means_alone() -> None:
    block, x = block_and_input((4, 6, 4, 8, 8, (3, 1), 1))
    means = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    assert torch.allclose(block.gate(x), block.gate(means))
    assert not torch.allclose(block.gate(x), block.gate(2 * means))


def test_branches_are_weighted_and_evaluated_once_each() -> None:
    """Of two other answers: the sum was not weighted; branch 0 was evaluated twice."""
    block, x = block_and_input((2, 6, 4, 8, 8, (3, 3, 1), 1))
    calls = []
    for l, C in enumerate(block.branches):
        C.register_forward_hook(lambda *_, l=l: calls.append(l))
    whole = block(x)
    assert calls == [0, 1, 2]
    with torch.no_grad():
        block.fc.weight.zero_()
        block.fc.bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    assert torch.allclose(block(x), 2 * block.branches[1](x))
    assert not torch.allclose(whole, block(x))


def test_no_layer_is_left_out_of_the_output_block() -> None:
    """Of another answer: the last fully connected layer was dropped by a zip."""
    block, x = OutputBlock(6), torch.randn(3, 6, 4, 5)
    expected = x.mean(dim=(2, 3)) @ block.fc.weight.T + block.fc.bias
    assert torch.allclose(block(x), expected, atol=1e-6)
    network = BlockNetwork(ROWS, stem_filters=6)
    assert len(network.blocks) == len(network.between) == len(ROWS)


@pytest.mark.parametrize("b", [0, 1, 2])
def test_the_network_takes_any_batch_and_gives_logits(b: int) -> None:
    network = BlockNetwork(ROWS, stem_filters=6).eval()
    x = torch.randn(b, 3, 32, 32)
    assert network(x).shape == (b, 10)
    assert [a.shape for a in network.gates(x)] == [(b, 2), (b, 3), (b, 1)]


def test_the_stem_whitens_patches() -> None:
    x = torch.randn(40, 3, 32, 32)
    x = x + 2 * x.roll(1, 3) + x.mean(dim=1, keepdim=True)
    stem = WhiteningStem(54)
    stem.fit(x)
    patches = nn.functional.unfold(x, 3, stride=3).transpose(1, 2).flatten(0, 1)
    filtered = patches @ stem.weight[:27].flatten(1).T
    assert torch.allclose(torch.cov(filtered.T), torch.eye(27), atol=0.05)
    assert torch.equal(stem.weight[27:], -stem.weight[:27])


def test_the_basic_network_is_the_same_with_everything_added_switched_off() -> None:
    basic = basic_network(ROWS)
    kinds = {type(layer).__name__ for layer in basic.modules()}
    assert kinds == {"BlockNetwork", "Sequential", "ModuleList", "IntermediateBlock", "Conv2d",
                     "Linear", "Between", "Identity", "OutputBlock"}  # fmt: skip
    assert [len(block.branches) for block in basic.blocks] == [2, 3, 1]
    assert {block.gate_kind for block in basic.blocks} == {"linear"}
    assert layer_table(basic).loc["B3", "output"] == "16×8×8"
    x = torch.randn(2, 3, 32, 32)
    expected = x
    for block in basic.blocks:
        expected = block(expected)
    assert torch.equal(basic(x), basic.output(expected))


def test_the_layer_table_counts_parameters_and_multiply_adds() -> None:
    network = BlockNetwork(ROWS, stem_filters=6)
    table = layer_table(network)
    assert table["parameters"].sum() == sum(
        p.numel() for p in network.parameters() if p.requires_grad
    )
    assert table.loc["stem", "multiply_adds"] == 6 * 27 * 32 * 32
    assert table.loc["B1", "multiply_adds"] == 8 * 6 * (9 + 1) * 32 * 32 + 6 * 2
    assert table.loc["B1", "output"] == "8×32×32"
    assert table.loc["after B1", "output"] == "8×16×16"
    assert "residual connection" in table.loc["after B2", "what"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"kernels": [2]}, "kernels"),
        ({"kernels": []}, "kernels"),
        ({"kernels": [3, True]}, "kernels"),
        ({"gate": "tanh"}, "gate"),
        ({"stride": 0}, "stride"),
        ({"implementation": "fast"}, "implementation"),
        ({"in_channels": 0}, "in_channels"),
    ],
)
def test_bad_arguments_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}=.* is not allowed"):
        IntermediateBlock(**{"in_channels": 8, "out_channels": 8} | wrong)


def test_wrong_inputs_are_named() -> None:
    block: nn.Module
    for block, x in ((IntermediateBlock(8, 8), torch.zeros(2, 3, 4, 4)),
                     (BlockNetwork(ROWS), torch.zeros(3, 32, 32))):  # fmt: skip
        with pytest.raises(ValueError, match="shape of x"):
            block(x)
    with pytest.raises(ValueError, match="residual of block 1"):
        BlockNetwork([{"channels": 8, "kernels": [3], "residual": True}])
    strided = IntermediateBlock(8, 8, stride=2, implementation="mixed")
    with pytest.raises(ValueError, match="stride"):
        strided(torch.zeros(1, 8, 4, 4))
