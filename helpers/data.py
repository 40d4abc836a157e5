"""CIFAR-10 as tensors: its splits, batches and near-duplicates, and a synthetic stand-in for it."""

from __future__ import annotations

import math
import os
import pickle
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from filelock import FileLock
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from helpers.project import ROOT, ProjectError, shown

CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
IMAGE_SIZE, TRAINING_IMAGES = 32, 50_000  # pixels high and wide; of CIFAR-10 and the stand-in
# Of the training images' channels (red, green, blue), as fractions of 255: notebook 01.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NEAR = 0.4  # relative distance below which two images are near-duplicates
PATIENCE = 15  # seconds without a byte after which a download is tried again

Augment = Callable[[Tensor, Tensor, int], Tensor]  # images, their numbers, epoch → images


class DataError(ProjectError):
    """The data cannot be used."""


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 N×3×32×32 in 0…255, and their labels, int64 N in 0…9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor | slice) -> ImageSet:
        """The images numbered `index`, in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def first(self, count: int) -> ImageSet:
        """The first `count` images; all of them for 0."""
        if count > len(self):
            raise DataError(f"{count} images are asked for and {len(self)} are there; take fewer.")
        return self.subset(slice(count or None))

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A dataset, `"cifar10"` or `"stand-in"`, and what its ten classes are called."""

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...] = CLASSES


def load_data() -> ImageData:
    """CIFAR-10 from `CIFAR10_ROOT`, by default `data/`; downloaded where there is nothing.

    The root is, or holds at most two folders down, the folder of CIFAR-10's files or its archive;
    a relative path counts from the project's root. The stand-in takes its place, announced, only
    if no root was set, `data/` does not hold it and there is no network.

    Raises:
        DataError: a file is damaged, a root that was set cannot serve, or a download fails.
    """
    given = os.environ.get("CIFAR10_ROOT", "").strip()
    root = Path(given or "data")
    remedy = f"put {CIFAR10.base_folder}/ or {CIFAR10.filename} there"
    try:
        root = ROOT / root.expanduser()
        source = _find(root)
        if not source and given and root.exists() and any(p.name[0] != "." for p in root.iterdir()):
            raise OSError("it holds other files")
        return _read(source or _download(root, "$CIFAR10_ROOT" if given else "data/"))
    except (OSError, RuntimeError) as problem:  # RuntimeError: ~ of an unknown user
        if isinstance(problem, ConnectionError) and not given:
            print(
                f"data/ holds no CIFAR-10 and there is no network ({problem}): synthetic stand-in "
                f"data take its place until you {remedy}."
            )
            return stand_in()
        named = f"CIFAR10_ROOT = {shown(root)}" if given else "data/"
        remedy += ", or name an empty folder to download into"
        raise DataError(f"{named} does not give CIFAR-10: {problem}; {remedy}.") from None


class Notice(str):
    """Text that a notebook shows; of several lines in a box, the first as its title."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str | None:
        title, _, text = self.partition("\n")
        style = "border: 6px solid #b30000; background: #fff3cd; color: #000; padding: 0.5em 1em"
        box = f'<div style="{style}"><h2>⚠ {title}</h2><p><b>{text}</b></p></div>'
        return box if text else None


def notice(images: ImageData) -> Notice:
    """What stands at the top of every notebook: which data its numbers come from."""
    sizes = f"{len(images.train):,} training and {len(images.test):,} test images"
    if images.name == "cifar10":
        return Notice(f"Data: CIFAR-10, {sizes}, checksums verified.")
    return Notice(
        "STAND-IN DATA, NOT CIFAR-10\nCIFAR-10 is not on this machine and could not be downloaded. "
        f"{sizes} of ten synthetic classes take its place, to try the report out. No number or "
        "figure below says anything about CIFAR-10, and none may stand beside its results."
    )


def split(labels: Tensor, validation: int = 5000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of the kept and of `validation` held-out images; every class gives the same
    share of its images, to one image."""
    if not 0 < validation < len(labels):
        raise DataError(f"validation = {validation}: hold out 1 to {len(labels) - 1} images.")
    shuffled = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Every (N / validation)-th image in the order of the classes.
    places = (torch.arange(validation).double() + 0.5) * len(labels) / validation
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[by_class[places.long()]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def parts(
    images: ImageData, validation: int = 0, train_images: int = 0, test_images: int = 0
) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """Training, validation (None for 0) and test images of a run: `split`, then the first
    `train_images` and `test_images` (all for 0)."""
    training, held_out = images.train, None
    if validation:
        training, held_out = map(training.subset, split(training.labels, validation))
    return training.first(train_images), held_out, images.test.first(test_images)


def normalise(images: Tensor) -> Tensor:
    """uint8 b×3×h×w in 0…255 → float32 of about zero mean and unit variance, channels last."""
    mean, std = (
        torch.tensor(numbers).view(1, 3, 1, 1).to(images.device, non_blocking=True)
        for numbers in (MEAN, STD)
    )
    x = (images / (255 * std)).sub_(mean / std)
    return x.contiguous(memory_format=torch.channels_last)


@dataclass(eq=False)
class Batches(IterableDataset):
    """Batches of even size, as a last one of a few images would move a network as far as a full
    one; each is fetched with one indexing and waits for no GPU."""

    images: ImageSet
    order: Callable[[], Tensor]  # gives the numbers of the images, for each pass anew
    count: int
    augment: Augment | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in self.order().tensor_split(self.count):
            batch = self.images.subset(index.to(self.images.labels.device, non_blocking=True))
            x = self.augment(batch.images, index, self.epoch) if self.augment else batch.images
            yield normalise(x), batch.labels, index


def training_loader(
    images: ImageSet,
    batch_size: int,
    augment: Augment,
    generator: Generator,
    epoch: int = 0,
    numbers: Tensor | None = None,
) -> DataLoader:
    """Shuffled, augmented batches of one epoch, counted from 0: x, float32 b×3×32×32, the labels
    and the images' numbers in the set, of those in `numbers` (default: all).

    The order is drawn from `generator`. On CUDA, where steps are replayed, all batches are full,
    and the images left over, others in each epoch, are not given.
    """
    numbers = torch.arange(len(images)) if numbers is None else numbers
    given, count = len(numbers), math.ceil(len(numbers) / batch_size)
    if images.labels.is_cuda:
        count = max(1, given // batch_size)
        given = count * batch_size

    def order() -> Tensor:
        return numbers[torch.randperm(len(numbers), generator=generator)[:given]]

    batches = Batches(images, order, count, augment, epoch)
    return DataLoader(batches, batch_size=None, generator=generator)


def evaluation_loader(images: ImageSet, batch_size: int = 500) -> DataLoader:
    """Clean batches in the images' own order, as `training_loader` gives them."""
    count = math.ceil(len(images) / batch_size)
    batches = Batches(images, lambda: torch.arange(len(images)), count)
    # A DataLoader without a generator of its own draws from the global one.
    return DataLoader(batches, batch_size=None, generator=Generator())


def near_duplicates(images: ImageData) -> Tensor:
    """Which test images, N booleans, have a training image nearer than `NEAR` standard deviations
    of their own pixels."""
    _, distance = nearest_training_images(images.test.images, images.train.images)
    return distance < NEAR * images.test.images.flatten(1).float().std(dim=1, correction=0)


def nearest_training_images(test: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of N×3×h×w training images to each of n×3×h×w test images, all uint8: its
    number, int64 n, and the root mean square difference of the pixels, float32 n in 0…255.

    Exact, as a projection never lengthens a distance: the full distance to the image that is
    nearest in the 384 first principal components is a limit, and all that are within it there,
    some ten of CIFAR-10's 50,000, are measured in full.
    """
    test, train, scale = test.flatten(1), train.flatten(1), math.sqrt(train[0].numel())
    mean = train[:1000].float().mean(0)
    basis = torch.linalg.svd(train[:1000] - mean, full_matrices=False).Vh[:384].T

    def project(images: Tensor) -> Tensor:  # n×384, and the norm of what is left out
        x = (images - mean) / scale
        inside = x @ basis
        outside = (x.square().sum(1) - inside.square().sum(1)).relu().sqrt()
        return torch.cat([inside, outside[:, None]], dim=1)

    def measure(images: Tensor, others: Tensor) -> Tensor:
        pairs = zip(images.split(128), others.split(128), strict=True)
        return torch.cat([(test[i].float() - train[j]).norm(dim=1) for i, j in pairs]) / scale

    projected = torch.cat([project(some) for some in train.split(2000)])
    squares, found = projected.square().sum(1), []
    for some in torch.arange(len(test)).split(100):  # 20 MB at a time
        here = project(test[some])
        bounds = torch.addmm(squares, here, projected.T, alpha=-2)
        bounds += here.square().sum(1, keepdim=True)
        limits = measure(some, bounds.argmin(1)).square() + 1  # 1: for rounding
        rows, columns = (bounds < limits[:, None]).nonzero().T
        distance = measure(some[rows], columns)
        order = distance.argsort(stable=True)
        order = order[rows[order].argsort(stable=True)]  # by test image, then by distance
        first = order[torch.searchsorted(rows, torch.arange(len(some)))]
        found.append((columns[first], distance[first]))
    index, distance = map(torch.cat, zip(*found, strict=True))
    return index, distance


def _find(root: Path) -> Path | None:
    """The folder of CIFAR-10's files, else its archive: `root`, or at most two folders down."""
    if root.is_file():
        return root
    for name in ("data_batch_1", CIFAR10.filename):
        for level in ("", "*/", "*/*/"):
            for path in sorted(root.glob(level + name)):
                return path.parent if name == "data_batch_1" else path
    return None


def _read(source: Path) -> ImageData:
    """CIFAR-10 from the folder of its files or straight from its archive, checksums verified."""
    if source.is_file():
        checksums = {source: CIFAR10.tgz_md5}
    else:
        published = [*CIFAR10.train_list, *CIFAR10.test_list]
        checksums = {source / name: md5 for name, md5 in published}
        checksums[source / CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    for path, md5 in checksums.items():
        if not check_integrity(path, md5):
            raise OSError(f"{path.name} is missing or fails its checksum")
    if source.is_file():
        with tarfile.open(source) as tar:
            files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isfile()}
    else:
        files = {path.name: path.read_bytes() for path in checksums}
    sets = []
    for names in (CIFAR10.train_list, CIFAR10.test_list):
        batches = [pickle.loads(files[name], encoding="latin1") for name, _ in names]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = torch.tensor([label for batch in batches for label in batch["labels"]])
        sets.append(ImageSet(torch.from_numpy(images), labels))
    return ImageData("cifar10", *sets)


def _download(root: Path, where: str) -> Path:
    """Download CIFAR-10's archive into `root`; what has come is kept and continued. Raises a
    ConnectionError if there is no network, another OSError if it fails for another reason."""
    archive, part = root / CIFAR10.filename, root / f".{CIFAR10.filename}.part"
    announced, reason = False, "what the server sends is not the whole archive"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        if archive.exists():  # from the process that had the lock
            return archive
        for attempt in range(5):
            have = part.stat().st_size if part.exists() else 0
            request = urllib.request.Request(CIFAR10.url, headers={"Range": f"bytes={have}-"})
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE * (attempt + 1)) as answer:
                    if not announced:
                        print(f"Downloading CIFAR-10 (170 MB) into {where}", flush=True)
                    announced = True
                    with part.open("ab" if answer.status == 206 else "wb") as file:
                        while block := answer.read1(1 << 16):
                            file.write(block)
            except (OSError, HTTPException) as problem:
                reason = getattr(problem, "reason", problem)
                if type(problem) is URLError and attempt == 0:
                    raise ConnectionError(reason) from None
                if getattr(problem, "code", None) == 416:  # nothing follows what is there
                    part.unlink()
                time.sleep(1)
            if check_integrity(part, CIFAR10.tgz_md5):
                return part.replace(archive)
    raise OSError(reason)


PATTERNS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda x, y: y.sin(),
    "columns": lambda x, y: x.sin(),
    "checks": lambda x, y: x.sin() * y.sin(),
    "diamonds": lambda x, y: (x + y).sin() * (x - y).sin(),
    "rings": lambda x, y: torch.hypot(x, y).sin(),
}


def stand_in(training: int = 50_000, test: int = 10_000, seed: int = 0) -> ImageData:
    """Synthetic images, the same for the same arguments: five patterns, wide and fine, of random
    place, width, colour, contrast and noise; for convolutions, and too hard for linear maps."""
    generator, sets = Generator().manual_seed(seed), []
    kinds = {
        f"{w} {p}": (k, PATTERNS[p]) for w, k in (("wide", 0.6), ("fine", 1.1)) for p in PATTERNS
    }
    for count in (training, test):
        labels = (torch.arange(count) % 10)[torch.randperm(count, generator=generator)]
        images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
        for label, (frequency, pattern) in enumerate(kinds.values()):
            for some in (labels == label).nonzero().flatten().split(250):  # fits the cache
                chance = torch.rand(len(some), 10, 1, 1, generator=generator)
                right, down, width, noise, ground, ink = chance.split([1, 1, 1, 1, 3, 3], dim=1)
                k, axis = frequency * (0.85 + 0.3 * width), torch.arange(32)
                drawn = pattern(k * (axis - 32 * right), k * (axis[:, None] - 32 * down))
                grain = 0.03 * noise * torch.randn(len(some), 1, 32, 32, generator=generator)
                pixels = 0.2 + 0.6 * ground + (0.6 * ink - 0.3) * drawn + grain
                images[some] = (255 * pixels).clamp(0, 255).to(torch.uint8)
        sets.append(ImageSet(images, labels))
    return ImageData("stand-in", *sets, classes=tuple(kinds))
