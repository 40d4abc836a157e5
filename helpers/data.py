"""CIFAR-10 in memory, its splits and its loaders; and a stand-in where it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import queue
import shutil
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    Sampler,
    SequentialSampler,
)
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

ROOT = Path(__file__).resolve().parent.parent
CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_SIZE = 32  # height and width in pixels
TRAINING_IMAGES, TEST_IMAGES = 50_000, 10_000  # of CIFAR-10, and of the stand-in
SECONDS_TO_CONNECT = 10
SPLIT_SEED = 0
SHORTLIST = 48  # training images whose distance to a test image is worked out in full

# Of the 50,000 training images, per channel (red, green, blue), as fractions of 255;
# notebook 01 computes them and a test compares.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
MEAN_COLOUR = (255 * torch.tensor(MEAN)).round()  # of the pixels, 0…255

Augment = Callable[[Tensor, Tensor, int], Tensor]  # images, their numbers, epoch → images


class DataError(Exception):
    """The data cannot be used; the message names the file or folder and the remedy."""


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 N×3×32×32 in 0…255, and their labels, int64 N in 0…9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """The images numbered `index`, in that order."""
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A dataset: its name (`"cifar10"` or `"stand-in"`), 50,000 training and 10,000 test images,
    and what its ten classes are called."""

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...] = CLASSES


# ---- from files to memory


def load_data() -> ImageData:
    """CIFAR-10 from `CIFAR10_ROOT`, downloaded when it is not there; or the stand-in.

    The stand-in comes only when the files are absent and cannot be downloaded; one printed
    sentence, soon if the server does not answer, then says why and where to put them.

    Raises:
        DataError: a file is there but fails its checksum or cannot be read.
    """
    folder = cifar10_folder()
    missing = missing_files(folder)
    if missing:
        try:
            fetch(folder)
        except (OSError, RuntimeError, HTTPException) as problem:
            print(
                f"CIFAR-10 is not in {shown(folder)} (missing: {', '.join(missing)}) and cannot be "
                f"downloaded ({cause(problem)}): put {CIFAR10.filename}, or the folder "
                f"{CIFAR10.base_folder} from it, into {shown(folder)} and run this again."
            )
            return stand_in()
    return read_cifar10(folder)


def cifar10_folder() -> Path:
    """Where CIFAR-10 is or will be: `CIFAR10_ROOT`, by default `data/`.

    A relative path counts from the project's root, so that it means the same to every notebook.

    Raises:
        DataError: it begins with ~ and the name of nobody here.
    """
    given = os.environ.get("CIFAR10_ROOT") or "data"
    try:
        return ROOT / Path(given).expanduser()
    except RuntimeError:
        raise DataError(
            f"CIFAR10_ROOT = {given!r} is no folder: there is no such user; write its whole path."
        ) from None


def shown(path: Path) -> str:
    """A path of the data for people: from the project's root, or from CIFAR10_ROOT as it is set."""
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return (Path("$CIFAR10_ROOT") / path.relative_to(cifar10_folder())).as_posix()


def missing_files(folder: Path) -> list[str]:
    """Names of CIFAR-10's files that are absent, for people; those that are there are verified.

    Raises:
        DataError: a file fails its checksum or cannot be read.
    """
    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    files = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    missing = []
    for name, checksum in files:
        path = folder / CIFAR10.base_folder / name
        if not is_verified(path, checksum):
            missing.append(name)
    return ["all files"] if len(missing) == len(files) else missing


def is_verified(path: Path, checksum: str) -> bool:
    """Whether a file is there; if it is, its md5 checksum has been found right.

    Raises:
        DataError: it is there but wrong, or cannot be read.
    """
    try:
        if not path.exists():
            return False
        right = check_integrity(path, checksum)
    except OSError as problem:
        raise DataError(
            f"{shown(path)} cannot be read ({cause(problem)}); give yourself the right to read it."
        ) from None
    if not right:
        raise DataError(
            f"{shown(path)} fails its checksum and is not used; delete it, so that it is "
            f"downloaded again, or put a good copy in its place."
        )
    return True


def fetch(folder: Path) -> None:
    """Put CIFAR-10's files into `folder`, from its archive there or else from the network.

    They are unpacked beside their place and moved once they are whole; what an interrupted
    download has left is removed. Of several processes one does it, and the others wait.

    Raises:
        OSError, RuntimeError, HTTPException: the network or the folder does not allow it.
        DataError: the archive is there but fails its checksum.
    """
    archive = folder / CIFAR10.filename
    archived = is_verified(archive, CIFAR10.tgz_md5)
    if not archived:
        check_connection(SECONDS_TO_CONNECT)
    with one_at_a_time(folder):
        if not missing_files(folder):  # another process has just put them there
            return
        if not archived:
            print(f"Downloading CIFAR-10 (170 MB) into {shown(folder)} …", flush=True)
        destination = folder / CIFAR10.base_folder
        destination.mkdir(parents=True, exist_ok=True)
        with emptied(folder / ".download") as work, quiet(), stalls_noticed():
            if archived:
                extract_archive(archive, work)
            else:
                CIFAR10(work, download=True)
            for file in (work / CIFAR10.base_folder).iterdir():
                file.replace(destination / file.name)


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """A folder to work in: empty at first, and gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let processes that fetch into one folder wait for each other."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    lock = FileLock(folder / ".download.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is putting CIFAR-10 into {shown(folder)}; waiting.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            Path(lock.lock_file).unlink()  # before others can have it, who else would lose theirs
        lock.release()


def check_connection(seconds: float) -> None:
    """Raise an OSError unless CIFAR-10's server sends something within `seconds`.

    A thread asks, because a name server that never answers heeds no timeout.
    """
    host = urlsplit(CIFAR10.url).hostname
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            with urllib.request.urlopen(CIFAR10.url, timeout=seconds) as response:
                response.read(1)
            answers.put(None)
        except Exception as problem:
            answers.put(problem)

    threading.Thread(target=ask, daemon=True).start()
    try:
        problem = answers.get(timeout=seconds)
    except queue.Empty:
        problem = TimeoutError(f"no answer within {seconds:g} s")
    if problem is not None:
        raise OSError(f"{host}: {cause(problem)}")


def cause(problem: Exception) -> str:
    """What went wrong, in the system's words, without the paths that its message may hold."""
    reason = getattr(problem, "reason", problem)
    return getattr(reason, "strerror", None) or str(reason).rstrip(".") or type(reason).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torchvision's progress bar and paths out of a notebook's stored outputs."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


@contextlib.contextmanager
def stalls_noticed() -> Iterator[None]:
    """Let a download that stands still end in a TimeoutError."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_CONNECT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_cifar10(folder: Path) -> ImageData:
    """CIFAR-10 from verified files."""
    sets = []
    for train in (True, False):
        source = CIFAR10(folder, train=train, download=False)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        sets.append(ImageSet(images, torch.tensor(source.targets)))
    return ImageData("cifar10", *sets)


class Notice:
    """A line that a notebook shows; where HTML can be shown and there is a title, in a box."""

    def __init__(self, text: str, title: str = "") -> None:
        self.text, self.title = text, title

    def __repr__(self) -> str:
        if not self.title:
            return self.text
        rule = "=" * 88
        return f"{rule}\n{self.title}\n{self.text}\n{rule}"

    def _repr_html_(self) -> str | None:
        if not self.title:
            return None
        return (
            '<div style="border: 6px solid #b30000; background: #fff3cd; color: #000; '
            f'padding: 0.5em 1em"><h2 style="color: #b30000">⚠ {self.title}</h2>'
            f"<p><strong>{self.text}</strong></p></div>"
        )


def notice(data: ImageData) -> Notice:
    """What stands at the top of every notebook: which data its numbers come from."""
    sizes = f"{len(data.train):,} training and {len(data.test):,} test images"
    if data.name == "cifar10":
        return Notice(f"Data: CIFAR-10, {sizes}, checksums verified.")
    return Notice(
        f"CIFAR-10 is not on this machine and could not be downloaded. {sizes} of ten drawn "
        "classes take its place, to try the report out. No number or figure below says anything "
        "about CIFAR-10, and none may stand beside its results.",
        title="STAND-IN DATA, NOT CIFAR-10",
    )


# ---- the stand-in


def stand_in(training: int = TRAINING_IMAGES, test: int = TEST_IMAGES, seed: int = 0) -> ImageData:
    """Drawn images in CIFAR-10's types and shapes, equally many of each class, the same for the
    same arguments.

    A figure or a pattern of random place, size, angle and colour lies on a shaded, grainy
    ground. What it is can be told from the arrangement of its pixels only, so that a linear
    classifier gets little of it and convolutions get most (a test holds the two apart).
    """
    generator = torch.Generator().manual_seed(seed)
    sets = [_drawn_set(count, generator) for count in (training, test)]
    return ImageData("stand-in", *sets, classes=tuple(SHAPES))


def _drawn_set(count: int, generator: torch.Generator) -> ImageSet:
    labels = (torch.arange(count) % len(SHAPES))[torch.randperm(count, generator=generator)]
    images = torch.empty(count, 3, 32, 32, dtype=torch.uint8)
    for label, shape in enumerate(SHAPES.values()):
        for some in (labels == label).nonzero().flatten().split(250):  # few enough for the cache
            images[some] = _draw(shape, len(some), generator)
    return ImageSet(images, labels)


def _draw(shape: Callable[[Tensor, Tensor], Tensor], n: int, generator: torch.Generator) -> Tensor:
    """n images of one shape, uint8 n×3×32×32."""

    def between(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=generator)

    across = torch.linspace(-1, 1, 32).view(1, 1, 1, 32)
    down = torch.linspace(-1, 1, 32).view(1, 1, 32, 1)
    u, v = across - between(-0.3, 0.3), down - between(-0.3, 0.3)
    angle, size = between(-math.pi, math.pi), between(0.45, 0.8)
    x = (u * angle.cos() + v * angle.sin()) / size
    y = (v * angle.cos() - u * angle.sin()) / size
    covered = (shape(x, y) * size * 16 + 0.5).clamp(0, 1)  # n×1×32×32; edges a pixel soft

    ground = between(0.1, 0.8, 3) + between(-0.2, 0.2, 3) * across + between(-0.2, 0.2, 3) * down
    # Three figures in four are lighter than their ground, the others darker.
    sign = (between(0, 1) < 0.75) * 2.0 - 1
    ink = sign * between(0.1, 0.5, 3)
    grain = torch.randn(n, 1, 32, 32, generator=generator) * between(0.02, 0.12)
    picture = (ground + grain).addcmul_(covered, ink)
    return picture.mul_(255).clamp_(0, 255).to(torch.uint8)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    sides = [x * math.cos(t) + y * math.sin(t) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    return 0.55 - torch.maximum(torch.maximum(sides[0], sides[1]), sides[2])


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(0.28 - torch.minimum(x, y), 0.95 - torch.maximum(x, y))


# Positive inside, negative outside, and about the distance from the edge; x and y are the
# shape's own coordinates, in which it reaches to about 1.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: 0.8 - torch.hypot(x, y),
    "ring": lambda x, y: 0.2 - (torch.hypot(x, y) - 0.75).abs(),
    "square": lambda x, y: 0.72 - torch.maximum(x.abs(), y.abs()),
    "triangle": _triangle,
    "cross": _cross,
    "flower": lambda x, y: 0.68 + 0.28 * torch.cos(5 * torch.atan2(y, x)) - torch.hypot(x, y),
    "stripes": lambda x, y: torch.sin(7 * x) / 7,
    "checks": lambda x, y: torch.sin(6 * x) * torch.sin(6 * y) / 6,
    "dots": lambda x, y: (torch.cos(7 * x) + torch.cos(7 * y) - 0.6) / 7,
    "ripples": lambda x, y: torch.sin(9 * torch.hypot(x, y)) / 9,
}


# ---- splits and loaders


def split(labels: Tensor, validation: int = 5000, seed: int = SPLIT_SEED) -> tuple[Tensor, Tensor]:
    """Indices of a stratified split: all but `validation` images, and `validation` images.

    Every class gives the same share (to one image); both parts are sorted. The same seed gives
    the same split.

    Raises:
        ValueError: a part would be empty.
    """
    if not 0 < validation < len(labels):
        raise ValueError(f"validation={validation!r} is not allowed; use 1 to {len(labels) - 1}.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Every (N / validation)-th image in the order of the classes.
    places = (torch.arange(validation).double() + 0.5) * len(labels) / validation
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class[places.long()]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def normalise(images: Tensor) -> Tensor:
    """uint8 b×3×h×w in 0…255 → float32 of about zero mean and unit variance, channels last."""
    mean, std = (
        torch.tensor(numbers).view(1, 3, 1, 1).to(images.device, non_blocking=True)
        for numbers in (MEAN, STD)
    )
    x = (images / (255 * std)).sub_(mean / std)
    return x.contiguous(memory_format=torch.channels_last)


class Batches(Dataset):
    """Fetches a whole batch by its list of indices, so that a batch is one indexing."""

    def __init__(self, images: ImageSet, augment: Augment | None) -> None:
        self.images, self.augment = images, augment
        self.epoch = 0

    def __getitem__(self, index: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.tensor(index)
        # Nothing here waits for a GPU, which is still busy with the batch before.
        batch = self.images.subset(chosen.to(self.images.labels.device, non_blocking=True))
        images = batch.images
        if self.augment is not None:
            images = self.augment(images, chosen, self.epoch)
        return normalise(images), batch.labels, chosen

    def __len__(self) -> int:
        return len(self.images)


class EvenBatches(Sampler[list[int]]):
    """Shuffled numbers in as few batches as `batch_size` allows, of equal size but for one.

    Every step of Muon is as long as any other, and batch normalisation follows the last batches:
    a last batch of a few images that were left over would move the network as far as a full one.

    Args:
        numbers: of the images to be given; may be replaced before each pass.
        generator: the only source of randomness here.
        full: whether all batches are of `batch_size` images, which a GPU needs that replays its
            steps; those left over, fewer than a batch and others in each pass, are not given.
    """

    def __init__(
        self, numbers: Tensor, batch_size: int, generator: torch.Generator, full: bool = False
    ) -> None:
        self.numbers, self.batch_size, self.generator = numbers, batch_size, generator
        self.full = full

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.numbers), generator=self.generator)
        given = self.numbers[order[: len(self) * self.batch_size]]
        return iter([batch.tolist() for batch in given.tensor_split(len(self))])

    def __len__(self) -> int:
        batches = len(self.numbers) / self.batch_size
        return max(1, math.floor(batches)) if self.full else math.ceil(batches)


def training_loader(
    images: ImageSet, batch_size: int, augment: Augment, generator: torch.Generator
) -> DataLoader:
    """Shuffled, augmented, normalised batches of at most `batch_size` images, all of equal size
    but for one image; on a GPU, of exactly so many, with the few left out that are left over.

    A batch is b×3×32×32 floats, b labels and the b numbers of its images in the set. The order
    comes from `generator` alone, so that nothing else that draws random numbers, such as another
    loader, changes the training. Call `set_epoch` before each epoch.
    """
    source = Batches(images, augment)
    full = images.labels.device.type == "cuda"
    sampler = EvenBatches(torch.arange(len(images)), batch_size, generator, full)
    return DataLoader(source, sampler=sampler, batch_size=None, generator=generator)


def set_epoch(loader: DataLoader, epoch: int, numbers: Tensor | None = None) -> None:
    """Tell a training loader which epoch, counted from 0, it is about to give, and the numbers of
    the images in it (all of the set, if they are not given)."""
    loader.dataset.epoch = epoch
    everyone = torch.arange(len(loader.dataset))
    loader.sampler.numbers = everyone if numbers is None else numbers


def evaluation_loader(images: ImageSet, batch_size: int = 500) -> DataLoader:
    """Clean, normalised batches in the images' own order, as `training_loader` gives them."""
    source = Batches(images, None)
    sampler = BatchSampler(SequentialSampler(source), batch_size, drop_last=False)
    # A DataLoader draws a number from the global generator for each iterator; this one does not.
    return DataLoader(source, sampler=sampler, batch_size=None, generator=torch.Generator())


# ---- neighbours


NEAR = 0.4  # relative distance below which notebook 01 takes two images for near-duplicates


def near_duplicates(images: ImageData) -> Tensor:
    """Which test images have a training image nearer than `NEAR`, N booleans.

    The distance is the root mean square of the pixels' differences, as a multiple of the standard
    deviation of the test image's own pixels. Measured in full are the pairs whose coarse images
    (see `_coarse`) are near enough, so that none is missed.
    """
    test, train = images.test.images, images.train.images
    limit = NEAR * test.flatten(1).float().std(dim=1, correction=0)
    coarse, others = _coarse(test, 4), _coarse(train, 4)
    near, squares = torch.zeros(len(test), dtype=torch.bool), others.square().sum(1)
    for numbers in torch.arange(len(test)).split(250):
        partial = torch.addmm(squares, coarse[numbers], others.t(), alpha=-2)  # without |t|²
        margin = 1 + 1.001 * limit[numbers].square()  # for rounding
        rows, columns = (partial < (margin - coarse[numbers].square().sum(1))[:, None]).nonzero().T
        for some, there in zip(numbers[rows].split(1000), columns.split(1000), strict=True):
            distance = (_pixels(test[some]) - _pixels(train[there])).norm(dim=1)
            near[some[distance < limit[some]]] = True
    return near


def nearest_training_images(
    test_images: Tensor, train_images: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` training images nearest to each test image, nearest first.

    The distance is the root mean square difference of the 3·h·w pixel values, 0…255. The distance
    of the coarse images (see `_coarse`), which matrix products give for all pairs, bounds it from
    below; the pairs with the lowest bounds are measured in full. Where everything found is nearer
    than any bound left out, nothing can have been missed.

    Args:
        test_images: uint8 n×3×h×w, h and w even.
        train_images: uint8 N×3×h×w.

    Returns:
        Numbers of training images, int64 n×count; their distances, float32 n×count; and whether
        these are certainly the nearest, n booleans.

    Raises:
        ValueError: `count` is not 1 to N.
    """
    if not 1 <= count <= len(train_images):
        raise ValueError(f"count={count!r} is not allowed; use 1 to {len(train_images)}.")
    length = min(len(train_images), max(SHORTLIST, 2 * count))
    listed, bound = _shortlist(_coarse(test_images, 2), _coarse(train_images, 2), length)
    index, distance = _measure(test_images, train_images, listed, count)
    certain = distance[:, -1] < bound * 0.999  # a margin for rounding
    return index, distance, certain | (length == len(train_images))


def _pixels(images: Tensor) -> Tensor:
    """uint8 n×3×h×w → float32 n×(3·h·w), centred so that little is lost to rounding, and scaled
    so that Euclidean distance is the root mean square difference."""
    return (images.flatten(1) - 127.5) / math.sqrt(math.prod(images.shape[1:]))


def _coarse(images: Tensor, k: int) -> Tensor:
    """Means of k×k pixels, times k, and the norm of what they leave out: n×(3·h/k·w/k + 1).

    An image is the sum of its coarse image and the rest, which are orthogonal; two rests differ
    by at least the difference of their norms. So coarse distances never exceed full ones.
    """
    parts = []
    for some in images.split(2000):
        x = _pixels(some).view(some.shape)
        means = F.avg_pool2d(x, k)
        rest = x - F.interpolate(means, scale_factor=float(k))
        left_out = rest.flatten(1).norm(dim=1, keepdim=True)
        parts.append(torch.cat([k * means.flatten(1), left_out], dim=1))
    return torch.cat(parts)


def _shortlist(test: Tensor, train: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For each row of `test`, the `length` nearest rows of `train`, and the largest of their
    distances, by |t − s|² = |t|² − 2 t·s + |s|²."""
    squares = train.square().sum(1)
    lists, bounds = [], []
    for some in test.split(250):
        partial = torch.addmm(squares, some, train.t(), alpha=-2)  # without |t|²
        partial, listed = partial.topk(length, largest=False)
        lists.append(listed)
        bounds.append((partial[:, -1] + some.square().sum(1)).clamp(min=0).sqrt())
    return torch.cat(lists), torch.cat(bounds)


def _measure(test: Tensor, train: Tensor, listed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` nearest of the listed training images and their distances, by differences."""
    found = []
    for some, candidates in zip(test.flatten(1).split(50), listed.split(50), strict=True):
        there = train.flatten(1)[candidates].float()  # 50×length×(3·h·w)
        distance = torch.cdist(
            some.float().unsqueeze(1), there, compute_mode="donot_use_mm_for_euclid_dist"
        ).squeeze(1)
        nearest, order = (distance / math.sqrt(test[0].numel())).topk(count, largest=False)
        found.append((candidates.gather(1, order), nearest))
    index, distance = zip(*found, strict=True)
    return torch.cat(index), torch.cat(distance)
