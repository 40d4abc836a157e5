"""CIFAR-10 as tensors: its splits, batches and near-duplicates, and a synthetic stand-in for it."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import ssl
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from itertools import combinations_with_replacement
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from helpers.project import ROOT, ProjectError, short, write_file

CLASSES = ("airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck")  # fmt: skip
# Of CIFAR-10 and of the stand-in: height and width in pixels, and how many images.
IMAGE_SIZE, TRAINING_IMAGES, TEST_IMAGES = 32, 50_000, 10_000
# Of the training images' channels (red, green, blue), as fractions of 255: notebook 01.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
NEAR = 0.4  # relative distance below which two images are near-duplicates
PATIENCE = 15  # seconds without a byte after which a download is tried again

Augment = Callable[[Tensor, Tensor, int], Tensor]  # images, their numbers, epoch → images


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
    if no root was set, `data/` does not hold it and there is no network. A `ProjectError` is raised
    if a file is damaged, a root that was set cannot serve, or a download fails.
    """
    given = os.environ.get("CIFAR10_ROOT", "").strip()
    root = Path(given or "data")
    remedy = f"put {CIFAR10.base_folder}/ or {CIFAR10.filename} there"
    try:
        root = ROOT / root.expanduser()
        sources = _find(root)
        if given and not sources and (not root.exists() or any(root.glob("[!.]*"))):
            raise OSError("it holds other files" if root.exists() else "it does not exist")
        images = _read(*(sources or [_download(root, "$CIFAR10_ROOT" if given else "data/")]))
        sizes = f"{len(images.train):,} training and {len(images.test):,} test images"
        print(f"Data: CIFAR-10, {sizes}, checksums verified.")
        return images
    except (OSError, RuntimeError) as problem:  # RuntimeError: ~ of an unknown user
        if isinstance(problem, ConnectionError) and not given:
            print(
                f"STAND-IN DATA, NOT CIFAR-10: data/ does not hold it, and there is no network "
                f"({problem}). Ten synthetic classes are used until you {remedy}. The results "
                "below say nothing about CIFAR-10."
            )
            return stand_in()
        named = f"CIFAR10_ROOT = {short(root)}" if given else "data/"
        remedy += ", or name an empty folder to download into"
        raise ProjectError(f"{named} does not hold CIFAR-10: {problem}; {remedy}.") from None


def split(labels: Tensor, validation: int = 5000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sorted indices of the kept and of `validation` held-out images; every class gives the same
    share of its images, to one image."""
    if not 0 < validation < len(labels):
        raise ProjectError(f"validation = {validation}: hold out 1 to {len(labels) - 1} images.")
    shuffled = torch.randperm(len(labels), generator=Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Every (N / validation)-th image in the order of the classes.
    places = (torch.arange(validation).double() + 0.5) * len(labels) / validation
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[by_class[places.long()]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def normalise(images: Tensor) -> Tensor:
    """uint8 b×3×h×w in 0…255 → float32 of about zero mean and unit variance, channels last."""
    mean, std = torch.tensor([MEAN, STD]).view(2, 1, 3, 1, 1).to(images.device, non_blocking=True)
    return (images / (255 * std) - mean / std).contiguous(memory_format=torch.channels_last)


def resize(images: Tensor, size: int) -> Tensor:
    """b×c×h×h images of floats as b×c×size×size: each pixel the mean of those that it covers
    (progressive resizing: J. Howard, fast.ai, in the DAWNBench competition of 2018)."""
    if images.shape[2:] == (size, size):
        return images
    # With matrices, as Apple's GPUs cannot interpolate 32 pixels to 24 by area.
    covered = F.adaptive_avg_pool1d(torch.eye(images.shape[2]), size).T  # size×h
    covered = covered.to(images, non_blocking=True)
    with torch.autocast(images.device.type, enabled=False):
        return (covered @ images @ covered.T).contiguous(memory_format=torch.channels_last)


@dataclass(eq=False)
class Batches(IterableDataset):
    """Batches whose sizes differ by at most one: no image weighs more than another."""

    images: ImageSet
    order: Callable[[], Tensor]  # gives the numbers of the images, for each pass anew
    count: int
    size: int  # height and width to which the images are resized
    augment: Augment | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for index in self.order().tensor_split(self.count):
            batch = self.images.subset(index.to(self.images.labels.device, non_blocking=True))
            x = self.augment(batch.images, index, self.epoch) if self.augment else batch.images
            yield resize(normalise(x), self.size), batch.labels, index


def training_loader(
    images: ImageSet, batch_size: int, augment: Augment, generator: Generator,
    epoch: int = 0, numbers: Tensor | None = None, size: int = IMAGE_SIZE,
) -> DataLoader:  # fmt: skip
    """Shuffled, augmented batches of one epoch, counted from 0: x, float32 b×3×size×size, labels,
    and the images' indices in the set. Only the images `numbers` are used (default: all). No batch
    has a single image, which batch normalisation could not normalise."""
    numbers = torch.arange(len(images)) if numbers is None else numbers
    count = max(min(math.ceil(len(numbers) / batch_size), len(numbers) // 2), 1)

    def order() -> Tensor:
        return numbers[torch.randperm(len(numbers), generator=generator)]

    batches = Batches(images, order, count, size, augment, epoch)
    return DataLoader(batches, batch_size=None, generator=generator)


def evaluation_loader(
    images: ImageSet, batch_size: int = 500, size: int = IMAGE_SIZE
) -> DataLoader:
    """Batches without augmentation, in the order of the set, of the same form."""
    count = math.ceil(len(images) / batch_size)
    batches = Batches(images, lambda: torch.arange(len(images)), count, size)
    # A DataLoader without a generator of its own draws from the global one.
    return DataLoader(batches, batch_size=None, generator=Generator())


def nearest_training_images(test: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of N×3×h×w training images to each of n×3×h×w test images, all uint8: its
    number, int64 n, and the root mean square difference of the pixels, float32 n in 0…255."""
    x, y = test.flatten(1).float(), train.flatten(1).float()
    index = torch.cat([torch.cdist(some, y).argmin(dim=1) for some in x.split(500)])
    return index, (x - y[index]).square().mean(dim=1).sqrt()


def _find(root: Path) -> list[Path]:
    """Folders of CIFAR-10's files, and archives: `root`, or at most two folders down."""
    if root.is_file():
        return [root]
    levels = ("", "*/", "*/*/")
    folders = [path.parent for level in levels for path in sorted(root.glob(f"{level}*_batch*"))]
    archives = [path for level in levels for path in sorted(root.glob(level + CIFAR10.filename))]
    return [*dict.fromkeys(folders), *archives]


def _read(source: Path, *others: Path) -> ImageData:
    """CIFAR-10 from the first place that holds it whole: the folder of its files or its archive."""
    published = {source / name: md5 for name, md5 in CIFAR10.train_list + CIFAR10.test_list}
    checksums = {source: CIFAR10.tgz_md5} if source.is_file() else published
    for path, md5 in checksums.items():
        if not check_integrity(path, md5):
            if others:
                return _read(*others)
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
    """Download CIFAR-10's archive into `root`, whole or not at all; a ConnectionError if there is
    no network, another OSError if it fails five times."""
    archive, reached = root / CIFAR10.filename, False
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".download.lock"):
        if archive.exists():  # from the process that had the lock
            return archive
        for attempt in range(5):
            time.sleep(attempt)
            try:
                with urllib.request.urlopen(CIFAR10.url, timeout=PATIENCE) as answer:
                    print(f"Downloading CIFAR-10 (170 MB) into {where}", flush=True)
                    reached, content = True, answer.read()
            except (OSError, HTTPException) as problem:
                reason = getattr(problem, "reason", problem)
                odd = (ssl.SSLError, TimeoutError) if attempt < 4 else ssl.SSLError
                if type(problem) is URLError and not reached and not isinstance(reason, odd):
                    raise ConnectionError(reason) from None
                continue
            if hashlib.md5(content).hexdigest() == CIFAR10.tgz_md5:
                write_file(archive, content)
                return archive
            reason = "the downloaded file fails its checksum"
    raise OSError(reason)


def stand_in(training: int = 50_000, test: int = 10_000, seed: int = 0) -> ImageData:
    """Synthetic images, the same for the same arguments: checks of ten shapes in random places and
    colours. A convolution tells them apart, a linear map does not."""
    shapes = [*combinations_with_replacement((2, 4, 7, 12), 2)]  # height and width in pixels
    generator, sets = Generator().manual_seed(seed), []
    for count in (training, test):
        labels = torch.randperm(count, generator=generator) % 10
        images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
        for some in torch.arange(count).split(250):  # fits the cache
            chance = torch.rand(len(some), 9, 1, generator=generator)
            shift, stretch, ground, ink = chance.split([2, 1, 3, 3], dim=1)
            side = torch.tensor(shapes)[labels[some], :, None] * (0.9 + 0.2 * stretch)
            waves = (math.pi * (torch.arange(32) / side + 2 * shift)).sin()  # n×2×32
            checks = waves[:, :1, :, None] * waves[:, 1:, None]  # n×1×32×32
            pixels = 0.3 + 0.4 * ground[..., None] + (ink[..., None] - 0.5) * checks
            images[some] = (255 * pixels).clamp(0, 255).to(torch.uint8)
        sets.append(ImageSet(images, labels))
    return ImageData("stand-in", *sets, tuple(f"checks {h}×{w}" for h, w in shapes))
