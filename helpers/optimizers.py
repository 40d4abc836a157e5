"""Muon for the branches' kernels, Adam for the rest, and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.optim import Optimizer

from helpers.model import BlockNetwork
from helpers.settings import Settings


class Muon(Optimizer):
    """Nesterov momentum whose step for each kernel bank is made orthogonal (K. Jordan).

    A bank c′×c×k×k is a matrix c′×(k·k·c); its step keeps the directions of the momentum but gives
    them all the same length, so that weak directions learn as fast as strong ones. The bank itself
    is kept at norm √c′, as in cifar10-airbench.
    """

    def __init__(
        self, kernels: Iterable[Tensor], lr: float, momentum: float, precision: torch.dtype
    ) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum})
        self.precision = precision  # of the products, which need not be exact

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}  # banks of one shape share their products
            for kernel in group["params"]:
                if kernel.grad is not None:
                    alike.setdefault(kernel.shape, []).append(kernel)
            for kernels in alike.values():
                momenta = torch.stack([self.momentum_of(k, group["momentum"]) for k in kernels])
                steps = orthogonal(momenta, self.precision)  # n×c′×(k·k·c)
                lr = torch.as_tensor(group["lr"], device=steps.device)  # a tensor on a GPU
                for kernel, step in zip(kernels, steps, strict=True):
                    kernel.mul_(math.sqrt(len(kernel)) / kernel.norm())
                    step = step.unflatten(1, (*kernel.shape[2:], -1)).permute(0, 3, 1, 2)
                    kernel.addcmul_(step, lr, value=-1)

    def momentum_of(self, kernel: Tensor, decay: float) -> Tensor:
        """The Nesterov momentum of a bank as a matrix, in the order of channels-last memory."""
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum = state["momentum"].mul_(decay).add_(kernel.grad)
        return torch.add(kernel.grad, momentum, alpha=decay).permute(0, 2, 3, 1).flatten(1)


def orthogonal(matrices: Tensor, precision: torch.dtype = torch.float32) -> Tensor:
    """n×r×c matrices with their singular values brought near 1, by three Newton–Schulz iterations
    with Muon's coefficients.

    Each iteration multiplies x by a polynomial of x·xᵀ. These polynomials, r×r, are multiplied
    first and x once, in the end: half the work where there are many more columns than rows.
    """
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    gram, factors = x @ x.mT, []
    for _ in range(3):
        if factors:  # x·xᵀ of the x of now; all these matrices are symmetric, and commute
            gram = factors[-1] @ gram @ factors[-1]
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        factors.append(factor)
    x = reduce(torch.matmul, factors) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(
    network: BlockNetwork, settings: Settings, precision: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Muon for the branches' kernels, Adam for the rest, with a rate of its own for the gates."""
    kernels = [branch.weight for block in network.blocks for branch in block.branches]
    gates = [p for block in network.blocks for p in block.fc.parameters() if p.requires_grad]
    chosen = {id(p) for p in (*kernels, *gates)}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    on_gpu = kernels[0].device.type == "cuda"
    groups = [{"params": others}, {"params": gates, "lr": settings.gate_learning_rate}]
    optimizers = [
        Muon(kernels, settings.learning_rate, settings.momentum, precision),
        torch.optim.Adam(
            groups, lr=settings.adam_learning_rate, betas=(0.9, 0.95), capturable=on_gpu
        ),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["first_lr"] = group["lr"]
        if on_gpu:  # where a step that is replayed reads it
            group["lr"] = torch.tensor(group["lr"], device=kernels[0].device)
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], share: float) -> None:
    """Linear decay: every rate is its first one times the share of the steps that are left."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        rate = group["first_lr"] * share
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
