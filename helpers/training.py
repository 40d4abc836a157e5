"""Loss, optimisers, schedule, loop: from a fresh network to a finished record."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from helpers import evaluation
from helpers.augment import Augmentation, shrink
from helpers.data import (
    ImageData,
    ImageSet,
    evaluation_loader,
    normalise,
    set_epoch,
    training_loader,
)
from helpers.runs import (
    NETWORK,
    ParameterError,
    Record,
    Run,
    Settings,
    check_batches,
    check_same_data,
    keep_freed_memory,
    load_network,
    pick_device,
    pick_precision,
    read_start,
    settings_of,
    surroundings,
    training_parts,
)

SECONDS_BETWEEN_CHECKPOINTS = 30
SECONDS_WORTH_A_CHECKPOINT = 5  # of training, at the end of an epoch
BATCHES_READ_AT_ONCE = 50  # of losses, from a GPU
IMAGES_FOR_STATISTICS = 10_000  # of batch normalisation, after the last epoch
IMAGES_IN_BETWEEN = 10_000  # clean training images measured where not all of them are


class TrainingError(Exception):
    """A training that cannot go on; the message says where it stopped and what to try."""


class Muon(Optimizer):
    """Nesterov momentum whose step for each bank of kernels is made orthogonal.

    A bank out×in×k×k is a matrix out×(k·k·in); its step keeps the directions of the momentum but
    gives them all the same length, so that weak directions learn as fast as strong ones. The
    bank itself is kept at norm √out. (K. Jordan's Muon, as cifar10-airbench uses it.)

    Args:
        kernels: weights of convolutions.
        lr: length of a step relative to the bank.
        momentum: of the gradients.
        precision: of the numbers with which steps are made orthogonal, which need not be exact.
    """

    def __init__(
        self,
        kernels: Iterable[Tensor],
        lr: float,
        momentum: float,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(kernels, {"lr": lr, "momentum": momentum})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # Banks of one shape share their matrix products.
            alike: dict[torch.Size, list[Tensor]] = {}
            for kernel in group["params"]:
                if kernel.grad is not None:
                    alike.setdefault(kernel.shape, []).append(kernel)
            for kernels in alike.values():
                momenta = torch.stack([self.direction(k, group) for k in kernels])
                steps = orthogonal(momenta, self.precision)
                lr = torch.as_tensor(group["lr"], device=steps.device)  # a tensor on a GPU
                for kernel, step in zip(kernels, steps):
                    kernel.mul_(math.sqrt(len(kernel)) / kernel.norm())
                    by_place = step.unflatten(1, (*kernel.shape[2:], -1))
                    kernel.addcmul_(by_place.permute(0, 3, 1, 2), lr, value=-1)

    def direction(self, kernel: Tensor, group: dict[str, Any]) -> Tensor:
        """The Nesterov momentum of a bank, as a matrix out×(k·k·in): a view of channels-last
        memory, and the order of columns makes no difference to a step."""
        state = self.state[kernel]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(kernel)
        momentum = state["momentum"].mul_(group["momentum"]).add_(kernel.grad)
        nesterov = torch.add(kernel.grad, momentum, alpha=group["momentum"])
        return nesterov.permute(0, 2, 3, 1).flatten(1)


def orthogonal(
    matrices: Tensor, precision: torch.dtype = torch.float32, iterations: int = 3
) -> Tensor:
    """n×r×c matrices with their singular values brought near 1 by Newton–Schulz iterations.

    The coefficients are Muon's: they do not converge to 1 exactly, but get near it quickly. Every
    iteration multiplies x by a polynomial of x·xᵀ. These polynomials, r×r, are multiplied first and
    x once, in the end: half the work for kernels of 3×3, which have many more columns than rows.
    """
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    gram, factors = x @ x.mT, []
    for _ in range(iterations):
        if factors:  # x·xᵀ of the x of now; all these matrices are symmetric, and commute
            gram = factors[-1] @ gram @ factors[-1]
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        factors.append(factor)
    x = reduce(torch.matmul, factors) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(
    network: nn.Module, settings: Settings, precision: torch.dtype = torch.float32
) -> list[Optimizer]:
    """Muon for the branches' kernels, Adam for everything else that learns."""
    kernels = [branch.weight for block in network.blocks for branch in block.branches]
    chosen = {id(kernel) for kernel in kernels}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
    on_gpu = kernels[0].device.type == "cuda"
    optimizers = [
        Muon(kernels, settings.learning_rate, settings.momentum, precision),
        torch.optim.Adam(
            others, lr=settings.adam_learning_rate, betas=(0.9, 0.95), capturable=on_gpu
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["first_lr"] = group["lr"]
            if on_gpu:  # where a step that is replayed reads it
                group["lr"] = torch.tensor(group["lr"], device=kernels[0].device)
    return optimizers


def set_learning_rate(optimizers: list[Optimizer], step: int, steps: int) -> float:
    """Linear decay from the first learning rate to (nearly) zero over all `steps` of a run.

    Returns the factor, in 1 … 0, by which every learning rate is multiplied now.
    """
    factor = 1 - step / steps
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["first_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
    return factor


def train_batch(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    weights: Tensor,
    optimizers: list[Optimizer],
    smoothing: float,
    precision: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """One step on one batch, whose images count as `weights` says: before the step, the loss of
    each of its b images, and whether it was right. In bfloat16 the maps are rounded to 8 binary
    digits; weights, momentum and loss are kept in float32. All tensors are on one device."""
    half = precision == torch.bfloat16
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
        logits = network(x)
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
    for optimizer in optimizers:
        optimizer.zero_grad()
    (weights @ losses / weights.sum()).backward()
    for optimizer in optimizers:
        optimizer.step()
    return losses.detach(), logits.argmax(dim=1) == labels


class Replayed:
    """A training step as a GPU does it quickly: recorded once and then replayed (a CUDA graph).

    A step is more than a thousand short calls, and to make them takes the CPU longer than the GPU
    needs to do them. A recording holds for batches of one shape and gates of one temperature. The
    first few steps of each are done call by call, in which libraries choose and memory is found.

    Args:
        step: takes tensors on the GPU and gives a tuple of them; what it changes stays in place.
        network: that of the step.
        stream: of the GPU's, on which to record; the usual one is none that can be recorded.
    """

    CALL_BY_CALL = 3

    def __init__(
        self,
        step: Callable[..., tuple[Tensor, ...]],
        network: nn.Module,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.step, self.network, self.stream = step, network, stream
        self.calls: Counter[tuple] = Counter()
        self.recordings: dict[tuple, tuple] = {}
        self.temperatures: list[float] = []

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        temperatures = [block.temperature for block in self.network.blocks]
        if temperatures != self.temperatures:  # they are numbers of the recordings, which keep
            self.temperatures = temperatures  # the memory of a step each
            self.calls.clear()
            self.recordings.clear()
        kind = tuple(x.shape for x in inputs)
        self.calls[kind] += 1
        if self.calls[kind] <= self.CALL_BY_CALL:
            return self.aside(*inputs)
        if kind not in self.recordings:
            self.recordings[kind] = self.record(*inputs)
        graph, own, outputs = self.recordings[kind]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    def aside(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call by call."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, *inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Tensor], tuple]:
        """The recording, the tensors that it reads and those that it writes."""
        self.network.zero_grad()  # gradients get a place of their own in the recording
        own = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            outputs = self.step(*own)
        return graph, own, outputs


def importance(losses: Tensor, skip: float, generator: torch.Generator) -> Tensor:
    """How much each of N images counts in an epoch, given their last losses.

    Of those that are learned better than the mean, each is left out (0) with probability `skip`,
    and the others count for them too (1/(1 − skip)), so that the gradient stays right in the mean;
    all others count 1, also those not seen yet, whose loss is NaN (InfoBatch: Qin et al., arXiv
    2303.04947).
    """
    if not skip:
        return torch.ones(len(losses))
    easy = losses < losses.nanmean()
    skipped = easy & (torch.rand(len(losses), generator=generator) < skip)
    return torch.where(easy, 1 / (1 - skip), 1.0).masked_fill(skipped, 0.0)


def augmentation_of(settings: Settings, images: int, generator: torch.Generator) -> Augmentation:
    """How a run varies a set of so many images."""
    return Augmentation(
        images, settings.translate, settings.flip, generator, settings.cutout,
        settings.trivial_augment,
    )  # fmt: skip


class Underway:
    """All that changes while a network is trained, so all that is needed to go on.

    Attributes:
        epoch: the one that is being trained, counted from 1.
        losses: the last loss of each training image; NaN if there is none yet.
        importance: how much each image counts in this epoch; 0 for those that are left out.
        drawn: the state of the generator with which the epoch's batches are drawn.
        batch: how many of its batches are done.
        rows: of those batches, for `batches.csv`.
        loss_sum, right, weight, seen, seconds: of those batches, for the epoch's row.
        pending: batches that were given to the device and are not read yet.
        saved: when the last checkpoint was.
    """

    POSITION = (
        "epoch", "losses", "importance", "batch", "rows", "loss_sum", "right", "weight", "seen",
        "seconds",
    )  # fmt: skip

    def __init__(self, network: nn.Module, training: ImageSet, settings: Settings) -> None:
        self.network, self.settings = network, settings
        self.device = next(network.parameters()).device
        self.precision = pick_precision(settings.precision, self.device)
        self.optimizers = optimizers = make_optimizers(network, settings, self.precision)
        precision, smoothing = self.precision, settings.label_smoothing

        def step(x: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            return train_batch(network, x, labels, weights, optimizers, smoothing, precision)

        on_gpu = self.device.type == "cuda"
        self.step = Replayed(step, network, torch.cuda.Stream()) if on_gpu else step
        # Shuffling and augmentation draw from this generator and from no other.
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.augmentation = augmentation_of(settings, len(training), self.generator)
        self.loader = training_loader(
            training, settings.batch_size, self.augmentation, self.generator
        )
        self.losses = torch.full((len(training),), math.nan)
        self.saved = time.perf_counter()
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.batch, self.rows, self.pending = epoch, 0, [], []
        self.loss_sum, self.right, self.weight, self.seen, self.seconds = 0.0, 0.0, 0.0, 0, 0.0
        skip = self.settings.skip_easy_in(epoch)
        self.importance = importance(self.losses, skip, self.generator)
        self.drawn = self.generator.get_state()
        self.choose()

    def choose(self) -> None:
        """Tell the loader which images this epoch is of."""
        set_epoch(self.loader, self.epoch - 1, self.importance.nonzero().flatten())

    def count(self) -> int:
        """The batches of this epoch."""
        return len(self.loader)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of the epoch that are still to be done.

        After an interruption the epoch's draws are made again from its start, and the batches
        that are done are passed over; that takes a moment, and gives exactly the same rest.
        """
        self.generator.set_state(self.drawn)
        return itertools.islice(self.loader, self.batch, None)

    def state(self) -> dict[str, Any]:
        """For `Record.save`."""
        return {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "drawn": self.drawn,
            "mirrored_first": self.augmentation.mirrored_first,
            "machine": machine_of(self.network, self.settings),
        } | {name: getattr(self, name) for name in self.POSITION}

    def note(self, index: Tensor, losses: Tensor, hits: Tensor, rate: float) -> None:
        """Of a batch that is given to the device: which images, their losses, whether they are
        right, and the learning rate. On a GPU they are only read with those of many batches, since
        reading waits for it."""
        self.pending.append((index, losses, hits, rate))
        if self.device.type != "cuda" or len(self.pending) == BATCHES_READ_AT_ONCE:
            self.read_pending()

    def read_pending(self) -> None:
        """Read what was noted, which then is done.

        Raises:
            TrainingError: a loss that is not finite.
        """
        for index, losses, hits, rate in self.pending:
            losses, weights = losses.cpu(), self.importance[index]
            loss = float(weights @ losses / weights.sum())
            self.batch += 1
            self.rows.append(
                {"epoch": self.epoch, "batch": self.batch, "loss": loss, "learning_rate": rate}
            )
            self.losses[index] = losses
            self.loss_sum += float(weights @ losses)
            self.right += float(weights @ hits.cpu().float())
            self.weight += float(weights.sum())
            self.seen += len(index)
            if not math.isfinite(loss):
                raise diverged(f"The loss is {loss}", self, rate)
        self.pending = []

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `state()`."""
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            here = optimizer.state_dict()["param_groups"]  # the same but for what a GPU needs
            optimizer.load_state_dict(saved | {"param_groups": here})
        self.drawn = state["drawn"]
        self.augmentation.mirrored_first = state["mirrored_first"]
        for name in self.POSITION:
            setattr(self, name, state[name])
        self.choose()


def train_epoch(underway: Underway, save: Callable[[], None]) -> dict[str, float]:
    """All batches of one epoch that are still to be done; the epoch's row of the history.

    Args:
        save: called twice a minute, and after the last batch of an epoch of several seconds.

    Raises:
        TrainingError: a loss or weights that are not finite.
    """
    settings = underway.settings
    underway.network.train()
    for block in underway.network.blocks:
        block.temperature = settings.temperature_in(underway.epoch)
    count, begin = underway.count(), time.perf_counter() - underway.seconds
    size = settings.image_size(underway.epoch)
    done = (underway.epoch - 1) * count + underway.batch
    for step, (x, labels, index) in enumerate(underway.batches(), done):
        rate = settings.learning_rate * set_learning_rate(
            underway.optimizers, step, settings.epochs * count
        )
        weights = underway.importance[index].to(x.device, non_blocking=True)
        losses, hits = underway.step(shrink(x, size), labels, weights)
        underway.note(index, losses, hits, rate)
        underway.seconds = time.perf_counter() - begin
        save_if_due(underway, save)
    underway.read_pending()
    underway.seconds = time.perf_counter() - begin
    check_weights(underway)
    # Before the epoch is measured, which takes a while.
    save_if_due(underway, save, now=underway.seconds > SECONDS_WORTH_A_CHECKPOINT)
    return {
        "epoch": underway.epoch, "loss": underway.loss_sum / underway.weight,
        "training_accuracy_running": underway.right / underway.weight,
        "learning_rate": underway.rows[-1]["learning_rate"],
        "seconds": underway.seconds, "images_per_second": underway.seen / underway.seconds,
    }  # fmt: skip


def save_if_due(underway: Underway, save: Callable[[], None], now: bool = False) -> None:
    """Save a checkpoint, if `now` or if the last one is half a minute old.

    Raises:
        TrainingError: a loss or weights that are not finite.
    """
    if now or time.perf_counter() - underway.saved > SECONDS_BETWEEN_CHECKPOINTS:
        underway.read_pending()
        check_weights(underway)
        save()
        underway.saved = time.perf_counter()


def check_weights(underway: Underway) -> None:
    """Raise a TrainingError if a weight is not finite, as after a last good loss."""
    if not all(weight.isfinite().all() for weight in underway.network.state_dict().values()):
        rate = underway.rows[-1]["learning_rate"]
        raise diverged("Weights are not finite", underway, rate)


def diverged(what: str, underway: Underway, rate: float) -> TrainingError:
    return TrainingError(
        f"{what} in epoch {underway.epoch}, batch {underway.batch}, at learning rate {rate:.3g}; "
        "try a lower learning_rate or adam_learning_rate."
    )


def machine_of(network: nn.Module, settings: Settings) -> dict[str, Any]:
    """What a network is trained on: processor, threads, instructions, device, precision."""
    return surroundings(next(network.parameters()).device, settings.precision)["hardware"]


def train(
    images: ImageData, settings: Settings, report: Callable[[str], None] = print
) -> tuple[nn.Module, Run]:
    """A whole run: network, loaders, epochs, and the record, which is written as it grows.

    The seed decides the network's first weights, the order of the images and their augmentation;
    measuring draws no random number, so it does not change the training. A run that was stopped
    is continued from its last checkpoint, about half a minute old at most, and gives on the same
    CPU with as many threads the same bits as one that was not. Another machine or number of threads
    sums in another order, so that numbers differ by rounding. The draws stay the same, unless
    `skip_easy` leaves images out by losses that differ so, or a GPU leaves out what does not fill a
    batch.

    Args:
        report: called with a line of text for each epoch, and if something is unusual.

    Returns:
        The trained network and its finished record.

    Raises:
        ParameterError: the device or the precision is not to be had here, a batch of one image
            cannot be learnt from, or the run `start_from` is none to go on from.
        RunError: the run cannot be recorded, or continued, or `start_from` cannot be read.
        TrainingError: a loss or weights that are not finite; the record says so too.
    """
    device = pick_device(settings.device)
    check_batches(settings, settings.images_of(len(images.train)))
    begin_with = earlier_network(settings, images)
    keep_freed_memory()
    with Record(settings, images, report) as record:
        network = train_and_record(images, settings, record, device, begin_with)
        return network, record.finish(network, final_metrics(network, record, images, settings))


def train_and_record(
    images: ImageData,
    settings: Settings,
    record: Record,
    device: torch.device,
    begin_with: nn.Module | None,
) -> nn.Module:
    """The epochs of a run, or what is left of them; the trained network.

    Args:
        begin_with: `earlier_network`; where there is none, the run begins with a fresh one.
    """
    training, validation = training_parts(images, settings)
    training, test = training.to(device), images.test.to(device)
    network = begin_with or first_network(training, settings)
    underway = Underway(network.to(device), training, settings)
    if (state := record.checkpoint()) is not None:
        go_on(underway, state, record)

    def save() -> None:
        record.save(underway.state())

    while underway.epoch <= settings.epochs:
        last = underway.epoch == settings.epochs
        try:
            row = train_epoch(underway, save)
            if last:
                before = row["seconds"]
                row["seconds"] += settle_statistics(underway.network, training, settings)
                row["images_per_second"] *= before / row["seconds"]
                round_to_half(underway.network)
                check_weights(underway)
        except TrainingError as error:
            record.fail(str(error))
            raise
        every = last or underway.epoch % settings.measure_training_every == 0
        measured = training if every else first(training, IMAGES_IN_BETWEEN)
        precision = torch.float32 if last else underway.precision
        row |= measure(underway.network, measured, test, validation, precision)
        row |= gate_entropies(underway.network, first(test, 1000))
        record.add_epoch(row, underway.rows)
        record.say(progress(row, settings, sum(row["seconds"] for row in record.epochs)))
        underway.begin_epoch(underway.epoch + 1)
        save_if_due(underway, save, now=row["seconds"] > SECONDS_WORTH_A_CHECKPOINT)
    return underway.network


def go_on(underway: Underway, state: dict[str, Any], record: Record) -> None:
    """Take up a run where its checkpoint was, and say so; also if the machine is another."""
    underway.restore(state)
    where = f"after batch {underway.batch} of {underway.count()} in epoch {underway.epoch}"
    if underway.epoch > underway.settings.epochs:
        where = "after its last epoch"
    record.say(f"run {record.name} goes on {where}")
    before, now = state["machine"], machine_of(underway.network, underway.settings)
    changed = [
        f"{name} {before.get(name)}, now {now[name]}"
        for name in now
        if before.get(name) != now[name]
    ]
    if changed:
        record.begun_on.append(before)
        record.say(
            f"it was begun on another machine ({'; '.join(changed)}), so that it will not end with "
            "the bits of one that was not stopped"
        )


def first_network(training: ImageSet, settings: Settings) -> nn.Module:
    """The network before training: kernels drawn from the seed, the stem fitted to the images."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = settings.network()
    for block in network.blocks:
        for branch in block.branches:
            # To pass x on is a better start than noise alone. The noise stays, though: branches
            # that begin alike, under equal weights a, would have equal gradients for ever.
            noise = branch.weight.detach().clone()
            nn.init.dirac_(branch.weight.detach()[: block.fc.in_features]).add_(
                noise[: block.fc.in_features]
            )
    network.fit_stem(normalise(training.images[:5000].cpu()))
    return network.to(memory_format=torch.channels_last)


def earlier_network(settings: Settings, images: ImageData) -> nn.Module | None:
    """The network of the run `start_from`, if one is named. Trained further, its learning rates
    fall once more (warm restarts: Loshchilov and Hutter, arXiv 1608.03983).

    Raises:
        ParameterError: that run has another network, or other images were held out of it.
        RunError: it was trained on other data, or it or its weights cannot be read.
    """
    if not settings.start_from:
        return None
    earlier = read_start(settings.start_from, settings.seed)
    for name in (*NETWORK, "validation"):  # with fewer held out, it knows some of them by heart
        own, other = getattr(settings, name), getattr(settings_of(earlier), name)
        if own != other:
            raise ParameterError(
                f"Parameter start_from = {earlier.name!r}: its {name} is {other!r}, and here it is "
                f"{own!r}; begin with a run that has the same network and the same images."
            )
    check_same_data(earlier, images)
    return load_network(earlier)


def first(images: ImageSet, count: int) -> ImageSet:
    """The first `count` images, or all if there are fewer."""
    return images.subset(torch.arange(min(count, len(images))))


def measure(
    network: nn.Module,
    training: ImageSet,
    test: ImageSet,
    validation: ImageSet | None,
    precision: torch.dtype,
) -> dict[str, float | None]:
    """Exact accuracies on clean images in evaluation mode; None if there is no validation set.

    Args:
        precision: of the maps: float32 for a result, that of the training on the way there, since
            measuring a wide network in float32 takes a fifth of the time of its epoch.
    """
    sets = {"training_accuracy": training, "test_accuracy": test, "validation_accuracy": validation}
    device = test.images.device
    return {
        name: None
        if part is None
        else evaluation.accuracy(
            evaluation.predict(network, part, device, precision=precision), part.labels
        )
        for name, part in sets.items()
    }


def settle_statistics(network: nn.Module, training: ImageSet, settings: Settings) -> float:
    """Estimate the means and variances of batch normalisation anew, as `settings.statistics` says.

    While training they follow the last few batches (`"running"`: they stay so). Estimated from
    10,000 training images they are no longer those of a moment: either of `"clean images"`, as they
    are to be classified (Wu and Johnson, arXiv 2105.07576), or of `"augmented images"`, as they
    were learnt from. Returns the seconds it took, which are part of training.
    """
    begin, batch = time.perf_counter(), 500
    if settings.statistics == "running":
        return 0.0
    whole = len(training) // batch * batch or len(training)  # all batches count alike
    some = first(training, min(whole, IMAGES_FOR_STATISTICS))
    if settings.statistics == "clean images":
        loader = evaluation_loader(some, batch)
    else:  # from draws of its own, so that they can be made again from the weights alone
        generator = torch.Generator().manual_seed(settings.seed)
        augmentation = augmentation_of(settings, len(some), generator)
        loader = training_loader(some, batch, augmentation, generator)
    update_bn(loader, network, training.images.device)
    return time.perf_counter() - begin


@torch.no_grad()
def round_to_half(network: nn.Module) -> None:
    """Round what was learned to half precision, in which it is kept: the last accuracy is then
    that of the kept weights, to the image."""
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())


def gate_entropies(network: nn.Module, images: ImageSet) -> dict[str, float]:
    """The mean entropy of each block's a, as a share of its maximum; NaN where L = 1."""
    weights = evaluation.gates(network, images)
    return {
        f"entropy_B{k}": float(evaluation.entropy(a).mean()) for k, a in enumerate(weights, start=1)
    }


def progress(row: dict[str, float], settings: Settings, elapsed: float) -> str:
    """The line of an epoch: size of the images, loss, accuracies, seconds, time left."""
    sizes = [settings.image_size(epoch) for epoch in range(1, settings.epochs + 1)]
    work = [size**2 for size in sizes]  # the time of an epoch is roughly in proportion
    left = elapsed * sum(work[row["epoch"] :]) / sum(work[: row["epoch"]])
    size = sizes[row["epoch"] - 1]
    line = (
        f"epoch {row['epoch']:>3}/{settings.epochs}  {size}×{size}  loss {row['loss']:.3f}  "
        f"training (running) {row['training_accuracy_running']:.2%}  "
        f"test {row['test_accuracy']:.2%}  "
    )
    if row["validation_accuracy"] is not None:
        line += f"validation {row['validation_accuracy']:.2%}  "
    return line + f"{row['seconds']:.0f} s  left {left / 60:.1f} min"


def final_metrics(
    network: nn.Module, record: Record, images: ImageData, settings: Settings
) -> dict[str, Any]:
    """The content of `metrics.json`; accuracies are fractions of one, of the last epoch."""
    device = next(network.parameters()).device
    last = record.epochs[-1]
    with_tta = evaluation.predict(network, images.test, device, evaluation.TTA)
    return {
        "dataset": images.name,
        "preset": settings.preset,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "test_accuracy": last["test_accuracy"],
        "test_accuracy_tta": evaluation.accuracy(with_tta, images.test.labels),
        "validation_accuracy": last["validation_accuracy"],
        "training_accuracy": last["training_accuracy"],
        "train_seconds": sum(row["seconds"] for row in record.epochs),
        "parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    } | surroundings(device, settings.precision)
