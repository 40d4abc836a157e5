"""One training: images → augmented batch → `train_step` → record, from fresh weights to the end."""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from helpers import data, evaluation, mixing
from helpers.augment import Augmentation
from helpers.data import ImageData, ImageSet
from helpers.model import BlockNetwork
from helpers.project import ProjectError
from helpers.runs import Run, RunWriter, load_network, surroundings
from helpers.settings import Settings, pick_device, pick_precision

SECONDS_BETWEEN_CHECKPOINTS = 30
MEASURED = 2_000  # clean training images whose accuracy is measured after an epoch
RECALIBRATED = 10_000  # images for batch-norm recalibration


def train(
    images: ImageData, settings: Settings, say: Callable[[str], None] = print
) -> tuple[BlockNetwork, Run]:
    """A whole run. The seed decides first weights, order and augmentation of the images.

    A run that was stopped goes on from its last checkpoint, half a minute old at most, and ends
    with the same bits (on the same CPU with as many threads). One that is finished is only read.
    Raises a ProjectError for a loss or weights that are not finite.
    """
    device = pick_device(settings.device)
    training, validation, test = (part and part.to(device) for part in parts(images, settings))
    with RunWriter(settings, images.name, say) as record:
        if (run := record.finished()) is not None:
            say(f"Run {run.name} is already finished; this is its record.")
            for row in run.history.to_dict("records"):
                say(epoch_line(row, settings))
            return load_network(run).to(device), run
        if device.type == "cpu" and mixing.unavailable():
            say(mixing.unavailable())
        state = TrainState(training, settings, device)
        if (checkpoint := record.checkpoint()) is not None:
            state.load(checkpoint)
            say(f"Run {record.name} resumes in epoch {state.epoch}, batch {len(state.rows) + 1}.")
        while state.epoch <= settings.epochs:
            train_epoch(state, record)
            row = state.end_epoch() | measure(state, training, validation, test)
            record.add_epoch(row, state.rows)
            say(epoch_line(row, settings))
            state.begin_epoch(state.epoch + 1)
            record.save(state.checkpoint())
        network = state.network.eval()
        return network, record.finish(network, final_metrics(state, record))


def parts(images: ImageData, settings: Settings) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """The training, validation (None if there are none) and test images of a run."""
    training, held_out = images.train, None
    if settings.validation:
        kept, chosen = data.split(training.labels, settings.validation)
        training, held_out = training.subset(kept), training.subset(chosen)
    return training.first(settings.train_images), held_out, images.test.first(settings.test_images)


def train_epoch(state: TrainState, record: RunWriter) -> None:
    """The steps of an epoch that are still to be done, with a checkpoint every half minute."""
    for x, labels, index in state.remaining_batches():
        importance = state.importance[index].to(x.device)
        losses, hits = train_step(
            state.network, state.optimizers, state.scaler, state.precision,
            state.settings.label_smoothing, x, labels, importance,
        )  # fmt: skip
        state.log_batch(index, losses, hits)
        if time.perf_counter() - state.last_save >= SECONDS_BETWEEN_CHECKPOINTS:
            record.save(state.checkpoint())


def train_step(
    network: nn.Module, optimizers: list[Optimizer], scaler: torch.amp.GradScaler,
    precision: torch.dtype, smoothing: float, x: Tensor, labels: Tensor, importance: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step on a batch. Returns the losses before the step, and which predictions are right: b.

    Args:
        precision: of the feature maps; weights, momentum and loss stay float32.
        smoothing: of the labels (Szegedy et al., arXiv 1512.00567).
        x, labels, importance: b×3×h×w, b, and how much each image counts, b.
    """
    with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        logits = network(x)  # b×10
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(importance @ losses / importance.sum()).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return losses.detach(), logits.argmax(dim=1) == labels


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
    """x with singular values near 1, by three Newton–Schulz iterations with Muon's coefficients:
    polynomials of the small matrix x·xᵀ, whose product is applied to x at the end."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.mT).mT
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.mT, torch.eye(len(x), device=x.device, dtype=x.dtype)
    for _ in range(3):
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomial.diagonal().add_(3.4445)
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
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


def initial_network(training: ImageSet, settings: Settings) -> BlockNetwork:
    """The network before training: kernels drawn from the seed, the stem fitted to the images.

    A kernel begins as the identity plus noise of its own: to pass x on is a better start than noise
    alone (cifar10-airbench), and branches that began alike would stay alike.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = settings.network()
    for branch in (branch for block in network.blocks for branch in block.branches):
        passed_on = branch.weight.detach()[: branch.in_channels]
        noise = passed_on.clone()
        nn.init.dirac_(passed_on).add_(noise)
    if network.stem:
        network.stem[0].fit(data.normalise(training.images[:5000].cpu()))
    return network.to(memory_format=torch.channels_last)


def infobatch_weights(losses: Tensor, skip: float, generator: torch.Generator) -> Tensor:
    """How much each of N images counts in an epoch, given their last losses (NaN: not seen yet).

    InfoBatch pruning (Qin et al., arXiv 2303.04947): of those below the mean loss, each is left out
    (0) with probability `skip`, and the others count for them too, 1/(1 − skip).
    """
    if not skip:
        return torch.ones(len(losses))
    easy = losses < losses.nanmean()
    left_out = easy & (torch.rand(len(losses), generator=generator) < skip)
    return torch.where(easy, 1 / (1 - skip), 1.0).masked_fill(left_out, 0.0)


class TrainState:
    """All that changes while a network is trained, so all that a checkpoint has to hold.

    Attributes:
        epoch: the one that is being trained, counted from 1; `rows`: of its batches that are done.
        losses: the last loss of each training image; NaN if there is none yet.
        importance: how much each image counts in this epoch; 0 for those that are left out.
        epoch_rng: the state of the generator with which the epoch's batches are drawn.
    """

    SAVED = ("precision", "epoch", "rows", "losses", "importance", "epoch_rng", "seconds")

    def __init__(self, training: ImageSet, settings: Settings, device: torch.device) -> None:
        self.training, self.settings = training, settings
        self.precision = pick_precision(settings.precision, device)
        self.network = initial_network(training, settings).to(device)
        self.optimizers = make_optimizers(self.network, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        # Order and augmentation draw from this generator and from no other.
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.augmentation = Augmentation(len(training), self.generator, settings)
        self.losses = torch.full((len(training),), math.nan)
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.rows, self.seconds = epoch, [], 0.0
        pruned = epoch <= 7 / 8 * self.settings.epochs  # the end sees all images, as in InfoBatch
        skip = self.settings.skip_easy if pruned else 0.0
        self.importance = infobatch_weights(self.losses, skip, self.generator)
        self.epoch_rng = self.generator.get_state()

    def remaining_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of this epoch that are still to be done: x, labels, numbers of the images.

        After an interruption the epoch's draws are made again, and the batches that are done are
        passed over, which gives exactly the same rest.
        """
        self.generator.set_state(self.epoch_rng)
        loader = data.training_loader(
            self.training, self.settings.batch_size, self.augmentation, self.generator,
            self.epoch - 1, self.importance.nonzero().flatten(),
            self.settings.image_size(self.epoch),
        )  # fmt: skip
        self.network.train()
        self.last_save = time.perf_counter()
        self.epoch_start = self.last_save - self.seconds
        for batch in itertools.islice(loader, len(self.rows), None):
            left = 1 - (self.epoch - 1 + len(self.rows) / len(loader)) / self.settings.epochs
            for group in (group for one in self.optimizers for group in one.param_groups):
                group["lr"] = group["initial_lr"] * left  # linear decay
            yield batch
            show_progress(f"epoch {self.epoch}: batch {len(self.rows)} of {len(loader)}")

    def log_batch(self, index: Tensor, losses: Tensor, hits: Tensor) -> None:
        """Note a batch's losses and hits. Raises a ProjectError for a loss that is not finite."""
        losses, hits, weights = losses.cpu(), hits.cpu(), self.importance[index]
        loss, weight = float(weights @ losses / weights.sum()), float(weights.sum())
        self.rows.append(
            {"epoch": self.epoch, "batch": len(self.rows) + 1, "loss": loss, "weight": weight,
             "hits": float(weights @ hits.float()), "images": len(index),
             "learning_rate": float(self.optimizers[0].param_groups[0]["lr"])}
        )  # fmt: skip
        self.losses[index] = losses
        self.seconds = time.perf_counter() - self.epoch_start
        self.check_finite("The loss is", [losses])

    def end_epoch(self) -> dict[str, Any]:
        """The epoch's row of the history; after the last one the network is finalised."""
        if self.epoch == self.settings.epochs:
            recalibrate(self.network, self.training, self.settings)
            round_to_half(self.network)
        self.check_finite("Weights are", self.network.state_dict().values())
        self.seconds = time.perf_counter() - self.epoch_start
        show_progress("")
        weight = sum(row["weight"] for row in self.rows)
        return {
            "epoch": self.epoch, "size": self.settings.image_size(self.epoch),
            "loss": sum(row["loss"] * row["weight"] for row in self.rows) / weight,
            "training_accuracy_running": sum(row["hits"] for row in self.rows) / weight,
            "learning_rate": self.rows[-1]["learning_rate"], "seconds": self.seconds,
        }  # fmt: skip

    def check_finite(self, what: str, values: Iterable[Tensor]) -> None:
        """Raise a ProjectError unless all values are finite."""
        if not all(value.isfinite().all() for value in values):
            raise ProjectError(
                f"{what} not finite in epoch {self.epoch}, batch {len(self.rows)}; try a lower "
                "learning_rate, adam_learning_rate or gate_learning_rate, under another run name."
            )

    def checkpoint(self) -> dict[str, Any]:
        self.last_save = time.perf_counter()
        return {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
        } | {name: getattr(self, name) for name in self.SAVED}

    def load(self, saved: dict[str, Any]) -> None:
        """Go back to a `checkpoint()`."""
        self.network.load_state_dict(saved["network"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.scaler.load_state_dict(saved["scaler"])
        for name in self.SAVED:
            setattr(self, name, saved[name])


def recalibrate(network: BlockNetwork, training: ImageSet, settings: Settings) -> None:
    """Estimate the means and variances of batch normalisation anew, from images augmented as in
    training; while training they follow the last few batches."""
    some = training.subset(slice(RECALIBRATED))
    generator = torch.Generator().manual_seed(settings.seed)
    augmentation = Augmentation(len(some), generator, settings)
    loader = data.training_loader(some, 500, augmentation, generator)
    update_bn((x for x, *_ in loader), network, some.images.device)


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Round what was learned to half precision, in which it is kept, so that the last accuracy is
    that of the kept weights."""
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())


def measure(
    state: TrainState, training: ImageSet, validation: ImageSet | None, test: ImageSet
) -> dict[str, float]:
    """Accuracies on clean images at the epoch's resolution, in the precision of the training; after
    the last epoch in float32, and of the test set from six views as well."""
    network, size = state.network, state.settings.image_size(state.epoch)
    last = state.epoch == state.settings.epochs
    precision = torch.float32 if last else state.precision
    sets = {"training": training.subset(slice(MEASURED)), "test": test, "validation": validation}
    sets = {name: images for name, images in sets.items() if images}
    logits = {name: evaluation.predict(network, s, precision, size) for name, s in sets.items()}
    right = {name: evaluation.accuracy(logits[name], s.labels) for name, s in sets.items()}
    found = {f"{name}_accuracy": share for name, share in right.items()}
    if last:
        views = evaluation.six_views(network, test, logits["test"], state.precision)
        found["test_accuracy_tta"] = evaluation.accuracy(views, test.labels)
    return found


def final_metrics(state: TrainState, record: RunWriter) -> dict[str, Any]:
    """The content of `metrics.json`; accuracies are those after the last epoch."""
    settings, device = state.settings, state.training.images.device
    accuracies = {name: n for name, n in record.epochs[-1].items() if "accuracy" in name}
    return {
        "dataset": record.config["dataset"], "preset": settings.preset, "seed": settings.seed,
        "epochs": settings.epochs, **accuracies,
        "train_seconds": sum(row["seconds"] for row in record.epochs),
        "parameters": sum(p.numel() for p in state.network.parameters() if p.requires_grad),
        **surroundings(device, state.precision),
    }  # fmt: skip


def epoch_line(row: dict[str, Any], settings: Settings) -> str:
    """The line of an epoch: resolution, loss, accuracies, seconds."""
    found = {name: row.get(f"{name}_accuracy") for name in ("training", "test", "validation")}
    accuracies = "".join(f"  {name} {n:.2%}" for name, n in found.items() if pd.notna(n))
    return (
        f"epoch {row['epoch']:>3}/{settings.epochs}  {row['size']}×{row['size']}  "
        f"loss {row['loss']:.3f}{accuracies}  {row['seconds']:.0f} s"
    )


def show_progress(text: str) -> None:
    """A line that the next one overwrites, where somebody watches: in JupyterLab or a terminal.
    What papermill or nbconvert stores holds nothing of it."""
    if sys.stdout.isatty() or "JPY_SESSION_NAME" in os.environ:
        print(f"\r{text:<40}\r", end="", flush=True)
