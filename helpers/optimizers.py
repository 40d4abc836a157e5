"""Muon for the branches' kernels, Adam for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from helpers.model import BlockNetwork
from helpers.settings import Settings


class Muon(Optimizer):
    """Nesterov momentum whose step for each kernel bank is made orthogonal (K. Jordan).

    A bank c′×c×k×k is a matrix c′×(c·k·k); its step keeps the directions of the momentum but gives
    them all the same length, so that weak directions learn as fast as strong ones. The bank itself
    is kept at norm √c′, as in cifar10-airbench.
    """

    def __init__(self, kernels: Iterable[Tensor], lr: float, momentum: float) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for kernel in (kernel for kernel in group["params"] if kernel.grad is not None):
                state, decay = self.state[kernel], group["momentum"]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(kernel)
                momentum = state["momentum"].mul_(decay).add_(kernel.grad)
                ahead = torch.add(kernel.grad, momentum, alpha=decay)  # c′×c×k×k
                step = orthogonal(ahead.flatten(1)).view(kernel.shape)
                kernel.mul_(math.sqrt(len(kernel)) / kernel.norm()).sub_(group["lr"] * step)


def orthogonal(x: Tensor) -> Tensor:
    """A matrix with its singular values brought near 1, by three Newton–Schulz iterations with
    Muon's coefficients: polynomials of x·xᵀ, a small matrix, whose product x is multiplied by."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.mT, torch.eye(len(x)).to(x)
    for _ in range(3):
        step = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        step.diagonal().add_(3.4445)
        product, gram = step @ product, step @ gram @ step
    return product @ x


def make_optimizers(network: BlockNetwork, settings: Settings) -> list[Optimizer]:
    """Muon for the branches' kernels, Adam for the rest, with a rate of its own for the gates."""
    kernels = [branch.weight for block in network.blocks for branch in block.branches]
    gates = [p for block in network.blocks for p in block.fc.parameters() if p.requires_grad]
    chosen = {id(p) for p in (*kernels, *gates)}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    groups = [{"params": others}, {"params": gates, "lr": settings.gate_learning_rate}]
    optimizers = [
        Muon(kernels, settings.learning_rate, settings.momentum),
        torch.optim.Adam(groups, lr=settings.adam_learning_rate, betas=(0.9, 0.95)),
    ]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers
