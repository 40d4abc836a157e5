"""What a run is: its parameters, checked, and its record in `notebooks/runs/<name>/`."""

from __future__ import annotations

import ast
import contextlib
import copy
import ctypes
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pandas as pd
import torch
import torchvision
import yaml
from filelock import FileLock, Timeout
from torch import nn

from helpers import mixing
from helpers.data import IMAGE_SIZE, ROOT, TRAINING_IMAGES, ImageData, ImageSet, split
from helpers.model import ACTIVATIONS, GATES, BlockNetwork, instructions, layer_table

RUNS = ROOT / "notebooks" / "runs"
PRESETS = ROOT / "notebooks" / "parameters"
BENCHMARKS = ROOT / "notebooks" / "benchmarks"  # of `make bench`, a folder a kind of CPU
CPU_TABLES = ("blocks", "steps", "full", "profile", "tried", "memory")  # in each of them
VERSION = 2  # of the records; to be raised when an older program could misread a newer record
# From which the means and variances of batch normalisation are, see `training.settle_statistics`.
STATISTICS = ("clean images", "augmented images", "running")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ParameterError(ValueError):
    """A parameter that cannot be used; the message names it, its value and what is allowed."""


class RunError(Exception):
    """A record that cannot be read or written; the message names it and the remedy."""


# ---- parameters: each is a field with its default (the quick preset's) and its check


def whole(default: int, low: int, high: float = math.inf) -> Any:
    """A field for an integer from `low` to `high`."""

    def fault(value: object) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"an integer {span(low, high)}"

    return dataclasses.field(default=default, metadata={"fault": fault})


def real(default: float, low: float, high: float = math.inf) -> Any:
    """A field for a finite number from `low` to `high`."""

    def fault(value: object) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = number and low <= value <= high and math.isfinite(value)
        return None if right else f"a number {span(low, high)}, in YAML with a point (1.0e-3)"

    return dataclasses.field(default=default, metadata={"fault": fault})


def span(low: float, high: float) -> str:
    return f"of at least {low}" if high == math.inf else f"from {low} to {high}"


def choice(default: str, allowed: tuple[str, ...]) -> Any:
    """A field for one of a few words."""

    def fault(value: object) -> str | None:
        return None if value in allowed else f"one of {', '.join(allowed)}"

    return dataclasses.field(default=default, metadata={"fault": fault})


def text(default: str, empty: bool) -> Any:
    """A field for a name that can be a folder's."""

    def fault(value: object) -> str | None:
        right = isinstance(value, str) and (NAME.fullmatch(value) or (empty and value == ""))
        return None if right else "a name of letters, digits, '.', '_' and '-'"

    return dataclasses.field(default=default, metadata={"fault": fault})


def device_name(default: str) -> Any:
    """A field for a device; whether the machine has it is asked by `pick_device`."""

    def fault(value: object) -> str | None:
        right = isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda", value)
        return None if right else "auto, cpu or cuda (which of several: CUDA_VISIBLE_DEVICES)"

    return dataclasses.field(default=default, metadata={"fault": fault})


def flag(default: bool) -> Any:
    """A field for true or false."""

    def fault(value: object) -> str | None:
        return None if isinstance(value, bool) else "true or false"

    return dataclasses.field(default=default, metadata={"fault": fault})


def wholes(default: list[int] | int, low: int, high: float = math.inf, single: bool = False) -> Any:
    """A field for a list of integers, each from `low` to `high`; or, if `single`, for one."""

    def fault(value: object) -> str | None:
        values = value if isinstance(value, list | tuple) else [value] if single else [None]
        right = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        if right and all(low <= v <= high for v in values):
            return None
        one = "an integer or " if single else ""
        return f"{one}a list of integers {span(low, high)}, such as [1, 2]"

    return dataclasses.field(default_factory=lambda: copy.copy(default), metadata={"fault": fault})


# The parameters of `Settings` that `BlockNetwork` takes.
NETWORK = (
    "widths", "branches", "kernel_size", "strides", "gate", "stem_filters", "stem_stride",
    "pool_after", "residual", "normalise", "activation",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Every parameter that a notebook takes; the defaults are the quick preset's.

    Raises:
        ParameterError: at construction, if a value has the wrong type or is out of range, or if
            several do not fit together.
    """

    preset: str = text("quick", empty=False)  # the name of the parameter file
    seed: int = whole(0, 0, 2**32 - 1)
    run: str = text("", empty=True)  # the record's name; empty: <preset>-seed<seed>
    device: str = device_name("auto")
    precision: str = choice("auto", ("auto", *PRECISIONS))  # of the maps while training
    # the images
    validation: int = whole(0, 0, 49_000)  # images held out of training; 0: train on all
    train_images: int = whole(0, 0, TRAINING_IMAGES)  # use only the first so many; 0: all
    basic_images: int = whole(20_000, 100, 45_000)  # on which notebook 02 tries the basic network
    # the network
    widths: list[int] = wholes([32, 32, 128, 128, 128, 128], 1, 4096)
    branches: int | list[int] = wholes(2, 1, 64, single=True)
    kernel_size: int | list[int] = wholes([3, 1], 1, 31, single=True)
    strides: int | list[int] = wholes(1, 1, 4, single=True)
    gate: str = choice("softmax", GATES)
    temperature: float = real(1.0, 1.0, 1000.0)  # of the softmax in the first epoch
    stem_filters: int = whole(24, 0, 96)
    stem_stride: int = whole(1, 1, 2)
    pool_after: list[int] = wholes([1, 3, 5], 1)
    residual: list[int] = wholes([], 1)
    normalise: bool = flag(True)
    activation: str = choice("silu", tuple(ACTIVATIONS))
    # the training
    start_from: str = text("", empty=True)  # a run whose weights are the first; empty: fresh ones
    epochs: int = whole(6, 1, 10_000)
    first_sizes: list[int] = wholes([16, 16], 8, IMAGE_SIZE)  # of images in the first epochs
    batch_size: int = whole(250, 1, TRAINING_IMAGES)
    learning_rate: float = real(0.07, 0.0, 100.0)  # Muon, on the branches' kernels
    momentum: float = real(0.85, 0.0, 0.999)  # of Muon
    adam_learning_rate: float = real(0.014, 0.0, 10.0)  # Adam, on everything else
    label_smoothing: float = real(0.1, 0.0, 0.999)
    translate: int = whole(2, 0, 31)
    flip: bool = flag(True)
    cutout: int = whole(0, 0, 31)
    trivial_augment: float = real(0.0, 0.0, 1.0)  # share of images altered by TrivialAugment
    skip_easy: float = real(0.0, 0.0, 0.9)  # share of the easier images that an epoch leaves out
    statistics: str = choice("clean images", STATISTICS)  # of batch normalisation, after the end
    # the measuring
    measure_training_every: int = whole(1, 1, 10_000)  # epochs; the test set after each of them

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            allowed = field.metadata["fault"](value)
            if allowed:
                raise ParameterError(f"Parameter {field.name} = {value!r}: it must be {allowed}.")
        if len(self.first_sizes) >= self.epochs:
            raise ParameterError(
                f"Parameter first_sizes = {self.first_sizes!r}: it must have fewer sizes than the "
                f"run has epochs ({self.epochs}), since the last epoch sees whole images."
            )
        if self.train_images and self.train_images + self.validation > TRAINING_IMAGES:
            raise ParameterError(
                f"Parameter train_images = {self.train_images}: beside validation = "
                f"{self.validation} only {TRAINING_IMAGES - self.validation} are left; use fewer."
            )
        if self.temperature > 1 and self.gate != "softmax":
            raise ParameterError(
                f"Parameter temperature = {self.temperature!r}: gate {self.gate} has none; use 1.0."
            )
        size = min([IMAGE_SIZE, *self.first_sizes])
        if fault := network_fault(self.architecture(), size):
            raise ParameterError(fault)

    def image_size(self, epoch: int) -> int:
        """Height and width in pixels of the training images in an epoch, counted from 1."""
        small = epoch <= len(self.first_sizes)
        return self.first_sizes[epoch - 1] if small else IMAGE_SIZE

    def temperature_in(self, epoch: int) -> float:
        """Of the gates in an epoch, counted from 1: it falls linearly, and is 1 in the second half
        of the run (Dynamic Convolution, arXiv 1912.03458, lets it fall over its first epochs)."""
        share = 0.0 if epoch == self.epochs else max(0.0, 1 - 2 * (epoch - 1) / self.epochs)
        return 1 + (self.temperature - 1) * share

    def images_of(self, training: int) -> int:
        """How many images are trained on, of a training set of so many."""
        left = training - self.validation
        return min(self.train_images, left) if self.train_images else left

    def skip_easy_in(self, epoch: int) -> float:
        """The share of easy images left out of an epoch, counted from 1: none in the last eighth
        of the run, as in InfoBatch (arXiv 2303.04947)."""
        return self.skip_easy if epoch <= 7 / 8 * self.epochs else 0.0

    def network(self) -> nn.Module:
        """The network of these parameters, freshly initialised."""
        return BlockNetwork(**{name: getattr(self, name) for name in NETWORK})

    def architecture(self) -> str:
        """The network's parameters as text, by which is remembered what depends on them alone."""
        return json.dumps({name: getattr(self, name) for name in NETWORK})


@functools.cache  # many records are of few networks, and each takes a twentieth of a second
def network_fault(architecture: str, size: int) -> str:
    """What is wrong with a network, `Settings.architecture`, or with it for images of that height
    and width; nothing, if it can be used."""
    with torch.device("meta"):  # shapes only: what fits is known before any image is read
        try:
            network = BlockNetwork(**json.loads(architecture))
        except ValueError as error:
            return f"The network's parameters do not fit together: {error}"
        try:
            network(torch.zeros(2, 3, size, size))
        except RuntimeError:
            return (
                f"Of images of {size}×{size} pixels this network leaves no map: use fewer "
                "numbers in pool_after, smaller strides or larger first_sizes."
            )
    return ""


def check_parameters(namespace: dict[str, Any]) -> Settings:
    """The settings of a notebook, from its variables, right after its parameters cell.

    papermill only warns of a name that a notebook does not know, and runs on the defaults; and in a
    notebook a misspelt line just sets another variable. So the latest cell of parameters is read
    again, papermill's and the notebook's own, and a name in it that is not known is refused.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        ParameterError: naming the parameter.
    """
    declared = [field.name for field in dataclasses.fields(Settings) if field.name in namespace]
    given = dict.fromkeys([*declared, *names_set(namespace.get("In", []))])
    return settings_from({name: namespace[name] for name in given})


def settings_from(given: dict[str, Any]) -> Settings:
    """The settings of named values, for this machine.

    Raises:
        ParameterError: a name that is not known, a value that cannot be used, or a device or
            precision that this machine does not have.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given:
        if name not in known:
            raise ParameterError(f"Parameter {name} is not known; known are: {', '.join(known)}.")
    settings = Settings(**given)
    pick_precision(settings.precision, pick_device(settings.device))
    return settings


def presets() -> list[str]:
    """The names of the parameter files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict:
    """The parameters of a preset, checked here once, before the first notebook has run for long.

    Raises:
        ParameterError: there is no such preset, or a parameter in it cannot be used.
    """
    if name not in presets():
        raise ParameterError(f"There is no preset {name!r}; choose from {', '.join(presets())}.")
    path = PRESETS / f"{name}.yaml"
    try:
        parameters = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ParameterError(
            f"{place(path)} is no YAML{line}; write lines like epochs: 6."
        ) from None
    if not isinstance(parameters, dict):
        raise ParameterError(f"{place(path)} holds no parameters; write lines like epochs: 6.")
    try:
        own_name = settings_from(parameters).preset
    except ParameterError as error:
        raise ParameterError(f"{place(path)} cannot be used: {error}") from None
    if own_name != name:
        raise ParameterError(f"{place(path)} calls itself {own_name}; write preset: {name} in it.")
    return parameters


def names_set(cells: list[str]) -> list[str]:
    """The variables set by the latest cell of parameters that was run, which sets `preset` and
    `seed`, and by the one that papermill injected behind it; it begins that with a comment."""
    own = [number for number, cell in enumerate(cells) if {"preset", "seed"} <= set(assigned(cell))]
    begin = own[-1] if own else 0
    after = [cell for cell in cells[begin + 1 :] if cell.startswith("# Parameters\n")]
    return [name for cell in [*cells[begin : begin + 1], *after] for name in assigned(cell)]


def assigned(cell: str) -> list[str]:
    """The variables that a cell sets by plain assignments; none if it is no Python."""
    try:
        statements = ast.parse(cell).body
    except SyntaxError:  # one with IPython's own commands
        return []
    targets = [s.targets[0] for s in statements if isinstance(s, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def pick_device(name: str) -> torch.device:
    """The device of a name; `"auto"` is the GPU if there is one, else the CPU.

    Raises:
        ParameterError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ParameterError(
            f"Parameter device = {name!r}: this machine has no such device; use auto or cpu."
        ) from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number type of a name; `"auto"` is bfloat16 where the device calculates with it, which
    takes about two thirds of the time, else float32.

    Raises:
        ParameterError: bfloat16 on a processor that has no instructions for it, which would take
            up to hundreds of times as long.
    """
    if device.type == "cuda":  # older ones pretend to
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        able = has.get("avx512_bf16", False) or has.get("amx_bf16", False)
    if name == "auto":
        return torch.bfloat16 if able else torch.float32
    if name == "bfloat16" and not able:
        raise ParameterError(
            f"Parameter precision = {name!r}: this processor has no instructions for it and would "
            "take up to hundreds of times as long; use auto or float32."
        )
    return PRECISIONS[name]


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones (elsewhere, do nothing).

    By default every large tensor is a fresh mapping, whose pages the system has to clear.
    """
    most_mappings, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD in malloc.h
    _mallopt({most_mappings: 0, trim_threshold: 2**31 - 1})


def give_back_freed_memory() -> None:
    """Let glibc give the memory of every freed tensor back at once (elsewhere, do nothing), so that
    a process has what it needs and no reserve, which would differ from one to the next."""
    mapping_threshold = -3  # M_MMAP_THRESHOLD
    _mallopt({mapping_threshold: 2**16})


def _mallopt(options: dict[int, int]) -> None:
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        for option, value in options.items():
            mallopt(option, value)


def training_parts(images: ImageData, settings: Settings) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on, and the validation images or None, as the settings say."""
    training, validation = images.train, None
    if settings.validation:
        kept, held_out = split(images.train.labels, settings.validation)
        training, validation = images.train.subset(kept), images.train.subset(held_out)
    if settings.train_images:
        training = training.subset(torch.arange(min(settings.train_images, len(training))))
    return training, validation


def check_batches(settings: Settings, images: int) -> None:
    """Refuse batches of one image, if the network's smallest map is a single position: batch
    normalisation has nothing to average then.

    Args:
        images: how many are trained on, in batches of equal size but for one image.

    Raises:
        ParameterError: such a batch can come about.
    """
    smallest = images // math.ceil(images / settings.batch_size)
    # Where easy images are left out, how many are left is known too late: an odd number, maybe.
    if smallest > 1 and not (settings.skip_easy and settings.batch_size == 2):
        return
    size = min([IMAGE_SIZE, *settings.first_sizes])
    with torch.device("meta"):
        try:
            settings.network().train()(torch.zeros(1, 3, size, size))
        except ValueError:
            raise ParameterError(
                f"Parameter batch_size = {settings.batch_size}: of {images:,} images it can leave "
                "a batch of one, from whose single position batch normalisation learns nothing; "
                "use another number, no skip_easy, or fewer numbers in pool_after."
            ) from None


def label(settings: Settings, images: ImageData) -> str:
    """The folder of figures: the run's name, of seed 0 without its seed; or the stand-in's."""
    name = settings.run or f"{settings.preset}-seed{settings.seed}"
    return name.removesuffix("-seed0") if images.name == "cifar10" else images.name


# ---- records


@dataclass(frozen=True)
class Run:
    """A finished run, read from its folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    history: pd.DataFrame  # a row an epoch
    batches: pd.DataFrame  # a row a training batch
    metrics: dict[str, Any]


class Record:
    """A run that is being written: what is known after an epoch is on disk after that epoch.

    A run that was begun under this name and not finished is continued, if it was begun with the
    same settings on the same data. Files are written aside and moved into place, so that whatever
    stops the program leaves whole files behind. A disk that is full does not stop the training:
    it is said, and the next writing tries again.

    Args:
        say: called with a sentence about what was continued or could not be written.

    Used in a `with` statement, which keeps other processes from writing the same record.

    Raises:
        RunError: on entering, if a run of that name is finished, failed, under way in another
            process or was begun with other settings; or if its folder cannot be made.
    """

    def __init__(
        self, settings: Settings, images: ImageData, say: Callable[[str], None] = print
    ) -> None:
        self.name = settings.run or free_name(f"{settings.preset}-seed{settings.seed}")
        self.folder = RUNS / self.name
        self.say = say
        self.epochs: list[dict[str, float]] = []
        self.batches: list[dict[str, float]] = []
        self.interruptions, self.over = 0, False
        self.begun_on: list[dict[str, Any]] = []  # `hardware` of machines before this one
        config = dataclasses.asdict(settings) | {
            "run": self.name, "dataset": images.name, "version": VERSION,
        }  # fmt: skip
        self.config = json.loads(json.dumps(config))  # as it reads back: with lists for tuples

    def __enter__(self) -> Record:
        """Make the folder, or check that what is in it can be continued; lock it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.folder / ".lock", timeout=0)
            self.lock.acquire()
        except Timeout:
            raise RunError(
                f"Run {self.name} is under way in another process; wait for it, or choose another "
                "name with the parameter run."
            ) from None
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            self.check_unfinished()
            if not (self.folder / "config.json").is_file():
                write_json(self.folder / "config.json", self.config)
        except OSError as error:
            self.lock.release()
            raise self.unwritable(error) from None
        except BaseException:
            self.lock.release()
            raise
        return self

    def unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{place(self.folder)} cannot be written: {error.strerror}; make room or give yourself "
            "the right to write there, before anything is trained."
        )

    def __exit__(self, *_: object) -> None:
        """Let others continue the run, if it is not over."""
        self.lock.release()
        if self.over:
            with contextlib.suppress(OSError):  # somebody else looks at it
                (self.folder / ".lock").unlink()

    def check_unfinished(self) -> None:
        """Refuse a run that is over, or that was begun with something else."""
        if (self.folder / "metrics.json").is_file() or (self.folder / "failed.json").is_file():
            raise RunError(
                f"A run named {self.name} is there already; choose another name with the "
                f"parameter run, or delete {place(self.folder)}."
            )
        if not (self.folder / "config.json").is_file():
            return
        begun = read_json(self.folder / "config.json")
        for name, value in self.config.items():
            if name != "basic_images" and begun.get(name) != value:  # notebook 02's, not the run's
                raise RunError(
                    f"Run {self.name} was begun with {name} = {begun.get(name)!r}, and now "
                    f"{name} = {value!r}: go on with the former, choose another name with the "
                    f"parameter run, or delete {place(self.folder)}."
                )
        self.config = begun

    def checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint that can be read, or None; loading it runs no code.

        One that cannot be used is moved aside, so that it never takes the place of a good one.

        Raises:
            RunError: it cannot be read at the moment.
        """
        for path in self.checkpoints():
            if not path.is_file():
                continue
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                begun = state["config"]
                if begun == self.config:
                    self.epochs, self.batches = state["epochs"], state["batches"]
                    self.interruptions = state["interruptions"] + 1
                    self.begun_on = state.get("begun_on", [])
                    return state["training"]
                fault = f"belongs to a run {begun['run']} of other parameters or another version"
            except Exception as error:  # whatever a damaged file leads to
                if out_of_reach(error):  # nothing may be wrong with it: it stays
                    raise RunError(
                        f"{place(path)} cannot be read now ({type(error).__name__}); start the run "
                        "again when the machine can."
                    ) from None
                fault = f"cannot be read ({type(error).__name__})"
            aside = path.with_name(f"{path.stem}-unusable.pt")
            self.say(f"{place(path)} {fault}: it is not used, but kept as {aside.name}.")
            with contextlib.suppress(OSError):
                path.replace(aside)
        return None

    def save(self, training: dict[str, Any]) -> None:
        """Write a checkpoint; the one before is kept beside it.

        Args:
            training: tensors, numbers, strings, lists and dictionaries of them.
        """
        state = {"config": self.config, "epochs": self.epochs, "batches": self.batches,
                 "interruptions": self.interruptions, "begun_on": self.begun_on,
                 "training": training}  # fmt: skip
        latest, before = self.checkpoints()
        self.write(latest, lambda file: torch.save(state, file), before)

    def checkpoints(self) -> tuple[Path, Path]:
        return self.folder / "checkpoint.pt", self.folder / "checkpoint-before.pt"

    def write(
        self, path: Path, content: Callable[[IO], object], before: Path | None = None
    ) -> bool:
        """`write_aside`, but where that fails it is said, and the training goes on."""
        try:
            write_aside(path, content, before)
        except (OSError, RuntimeError) as error:  # torch.save makes the one of the other
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            self.say(f"{place(path)} could not be written ({reason}); the training goes on.")
            return False
        return True

    def add_epoch(self, row: dict[str, float], batches: list[dict[str, float]]) -> None:
        """Add an epoch's row of `history.csv` and its rows of `batches.csv`."""
        self.epochs.append(row)
        self.batches += batches
        self.write_tables()

    def write_tables(self) -> bool:
        tables = {"history.csv": self.epochs, "batches.csv": self.batches}
        return all(
            [
                self.write(self.folder / name, as_bytes(pd.DataFrame(rows).to_csv(index=False)))
                for name, rows in tables.items()
            ]
        )

    def fail(self, why: str) -> None:
        """Mark the run as failed; its last checkpoint stays."""
        self.write(self.folder / "failed.json", as_bytes(as_json({"failed": why})))

    def finish(self, network: nn.Module, metrics: dict[str, Any]) -> Run:
        """Write the weights and `metrics.json`, which holds their checksum, remove the checkpoints,
        and give the record.

        Where not all of it can be written the run stays unfinished, and its last checkpoint stays:
        started again, it only has to be measured and written.
        """
        weights = {
            name: value.half() if value.is_floating_point() else value  # exact: see round_to_half
            for name, value in network.state_dict().items()
        }
        content = io.BytesIO()
        torch.save(weights, content)
        metrics = metrics | {
            "interruptions": self.interruptions,
            "weights_sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        }
        if self.begun_on:
            metrics["begun_on"] = self.begun_on
        whole = self.write(self.folder / "weights.pt", lambda file: file.write(content.getvalue()))
        whole = self.write_tables() and whole
        if whole and self.write(self.folder / "metrics.json", as_bytes(as_json(metrics))):
            for path in self.checkpoints():
                path.unlink(missing_ok=True)
            self.over = True
        else:
            self.say(f"Run {self.name} stays unfinished: make room, and start it again.")
        history, batches = pd.DataFrame(self.epochs), pd.DataFrame(self.batches)
        return Run(self.name, self.folder, self.config, history, batches, metrics)


def place(path: Path) -> str:
    """A path as a reader of a notebook knows it: within the project."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def out_of_reach(error: Exception) -> bool:
    """Whether a file that could not be read may be whole: the disk or the memory failed. (Where
    there is no memory PyTorch raises a RuntimeError.)"""
    return isinstance(error, (OSError, MemoryError)) or "allocate memory" in str(error)


def sync(file: IO) -> None:
    """Have the system put a file on the disk before anything is done that relies on it."""
    file.flush()
    os.fsync(file.fileno())


def write_aside(path: Path, content: Callable[[IO], object], before: Path | None = None) -> None:
    """Write a file aside and move it into place: readers find the old one or the new one.

    Args:
        content: writes into the open file.
        before: where the old one is moved to, if it is to be kept.
    """
    written = path.with_name(path.name + ".new")
    try:
        with written.open("wb") as file:
            content(file)
            sync(file)
        if before is not None and path.is_file():
            path.replace(before)
        written.replace(path)
    finally:  # half a file would keep the room that the next one needs
        with contextlib.suppress(OSError):
            written.unlink()


def as_bytes(text: str) -> Callable[[IO], object]:
    """For `write_aside`: what writes the text."""
    return lambda file: file.write(text.encode("utf-8"))


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_aside(path, as_bytes(as_json(content)))


def read_json(path: Path) -> dict[str, Any]:
    """The content of a record's file.

    Raises:
        RunError: it is not there, or no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{place(path)} cannot be read ({type(error).__name__}); restore it, or delete its "
            "folder and make it again."
        ) from None
    if not isinstance(content, dict):
        raise RunError(
            f"{place(path)} cannot be read (no names and values in it); restore it, or delete its "
            "folder and make it again."
        )
    return content


@contextlib.contextmanager
def ending_in_a_sentence(expected: tuple[type[Exception], ...], stopped: str) -> Iterator[None]:
    """Let a command end with one sentence and status 1 if something stops it.

    Args:
        expected: errors whose message is such a sentence.
        stopped: what to say when it was stopped from the keyboard.
    """
    try:
        yield
    except expected as error:
        sys.exit(str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        where = place(Path(error.filename)) if error.filename else "A file"
        sys.exit(f"{where} cannot be written or read: {error.strerror or error}.")
    except KeyboardInterrupt:
        sys.exit(stopped)


def free_name(stem: str) -> str:
    """The first of `stem`, `stem-2`, `stem-3` … of which there is no run that is over."""
    name, number = stem, 2
    while any((RUNS / name / end).exists() for end in ("metrics.json", "failed.json")):
        name, number = f"{stem}-{number}", number + 1
    return name


def latest(stem: str) -> str:
    """The name of that run among `stem`, `stem-2` … which was finished last; if none is finished,
    `stem` itself, if it was begun.

    Raises:
        RunError: there is none.
    """
    named = re.compile(re.escape(stem) + r"(-(\d+))?")
    finished = {}
    for path in RUNS.glob("*/metrics.json"):
        if match := named.fullmatch(path.parent.name):
            when = read_json(path).get("finished", "")
            finished[path.parent.name] = when, int(match[2] or 1)
    if not finished and (RUNS / stem).is_dir():
        return stem  # `read` says why it cannot be used
    if not finished:
        raise RunError(
            f"There is no finished run {stem}; make it with notebook 03, or name another with the "
            f"parameter run (there are: {', '.join(names()) or 'none'})."
        )
    return max(finished, key=finished.get)


def names() -> list[str]:
    """The names of all finished runs."""
    return sorted(metrics.parent.name for metrics in RUNS.glob("*/metrics.json"))


def finished() -> list[Run]:
    """All finished runs, by name."""
    return [read(name) for name in names()]


# What every record holds, also the oldest; parameters that came later have defaults.
CONFIG = ("dataset", "preset", "seed", "run", "widths", "branches", "kernel_size", "epochs")
METRICS = (
    "dataset", "preset", "seed", "epochs", "test_accuracy", "test_accuracy_tta",
    "validation_accuracy", "training_accuracy", "train_seconds", "parameters", "finished",
    "hardware", "versions",
)  # fmt: skip


def read(name: str) -> Run:
    """A finished run.

    Raises:
        RunError: there is no such run, it is not finished, it failed, or cannot be read.
    """
    folder = RUNS / name
    if not folder.is_dir():
        raise RunError(f"There is no run {name}; there are: {', '.join(names()) or 'none'}.")
    if (folder / "failed.json").is_file():
        why = read_json(folder / "failed.json").get("failed", "its record does not say why.")
        raise RunError(f"Run {name} failed, so there is nothing to analyse: {why}")
    if not (folder / "metrics.json").is_file():
        raise RunError(
            f"Run {name} is not finished: its metrics.json is missing; notebook 03 with the same "
            "parameters continues it."
        )
    config = read_json(folder / "config.json")
    if config.get("version", 1) not in range(1, VERSION + 1):
        raise RunError(
            f"Run {name} has a record of version {config['version']}, and this program knows "
            f"{VERSION}; use the program that made it, or a newer one."
        )
    try:
        history, batches = (pd.read_csv(folder / f"{part}.csv") for part in ("history", "batches"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"The tables of run {name} cannot be read ({type(error).__name__}); make it again."
        ) from None
    metrics = read_json(folder / "metrics.json")
    for part, content, needed in (("config", config, CONFIG), ("metrics", metrics, METRICS)):
        if lacking := [key for key in needed if key not in content]:
            raise RunError(
                f"{place(folder / part)}.json lacks {', '.join(lacking)}; restore it, or delete "
                "its folder and make the run again."
            )
    return Run(name, folder, config, history, batches, metrics)


def check_same_data(run: Run, images: ImageData) -> None:
    """Refuse to analyse a run on other data than it was trained on.

    Raises:
        RunError: naming both.
    """
    if run.metrics["dataset"] != images.name:
        raise RunError(
            f"Run {run.name} was trained on {run.metrics['dataset']}, and the data here is "
            f"{images.name}: make a run on this data with notebook 03, or name one "
            "that was."
        )


def settings_of(run: Run) -> Settings:
    """The settings that a run was made with."""
    known = {field.name for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in parameters_of(run).items() if name in known})


def load_network(run: Run) -> nn.Module:
    """The trained network of a run, in evaluation mode; its maps' memory is kept for the next ones.

    Raises:
        RunError: the weights are not there (they are kept in the repository for few runs only), or
            they are not those that the run wrote.
    """
    path = run.folder / "weights.pt"
    if not path.is_file():
        raise RunError(
            f"Run {run.name} has no weights here (notebooks/runs/{run.name}/weights.pt); "
            "make it again with notebook 03, under another name, and give that name instead."
        )
    network = settings_of(run).network().to(memory_format=torch.channels_last)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != run.metrics.get("weights_sha256"):
            raise ValueError("another checksum")
        network.load_state_dict(
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        )
    except Exception as error:  # whatever a damaged file leads to
        raise RunError(
            f"The weights in {place(path)} are not those of run {run.name} or cannot be read "
            f"({type(error).__name__}); get them again, or make the run again with notebook 03."
        ) from None
    keep_freed_memory()
    return network.eval()


def surroundings(device: torch.device, precision: str = "float32") -> dict[str, Any]:
    """When and on what something was made: `finished`, `hardware`, `versions`.

    Args:
        precision: of the calculation, or `"auto"`: see `pick_precision`.
    """
    hardware: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "device": device.type,
        "precision": str(pick_precision(precision, device)).removeprefix("torch."),
    }
    if device.type == "cpu":
        hardware["compiled"] = not mixing.missing()  # whether blocks have that form
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {"finished": finished, "hardware": hardware, "versions": versions}


def processor() -> str:
    """The processor's name, as Linux gives it, or else the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def seeds_of(run: Run, among: list[Run] | None = None) -> pd.DataFrame:
    """The metrics of all finished runs like this one, a row a seed.

    Like it are those with the same settings on the same data and the same kind of device, but for
    seed and name. Of several with one seed the latest counts. `train_seconds` are of the whole
    training, with that of the runs that it went on from.

    Args:
        among: the runs to look through; None for all that are on record.
    """
    among = finished() if among is None else among
    alike = [other for other in among if what_counts(other) == what_counts(run)]
    alike.sort(key=lambda other: (other.metrics["seed"], other.metrics["finished"]))
    rows = pd.DataFrame(
        [
            {"run": other.name} | other.metrics | {"train_seconds": training_seconds(other)}
            for other in alike
        ]
    )
    return rows.drop_duplicates("seed", keep="last").reset_index(drop=True)


# What a configuration holds besides the training. Devices and precisions that differ are of
# another `kind_of` machine.
NOT_OF_THE_TRAINING = (
    "device", "precision", "run", "basic_images", "measure_training_every", "version",
)  # fmt: skip


def what_counts(run: Run) -> dict[str, Any]:
    """What a run's accuracy and time depend on, but for the seed (also of the run that it went on
    from): the kind of device and what it calculates with, and the configuration without what does
    not change the training. Nor does the name of the preset, which may have been another then."""
    known = parameters_of(run)
    ignored = ("seed", "preset", *NOT_OF_THE_TRAINING)
    counts = {name: value for name, value in known.items() if name not in ignored}
    before = without_seed(known["start_from"])
    return counts | {"kind": kind_of(run), "start_from": before}


def seeds_anywhere(run: Run) -> pd.DataFrame:
    """`seeds_of` a run and, below, those of its parameters on every other `kind` of machine, which
    is a column."""
    among = finished()
    alike = [run, *(other for other in among if recipe(other) == recipe(run))]
    firsts = {kind_of(other): other for other in reversed(alike)}
    kinds = {kind: seeds_of(firsts[kind], among) for kind in map(kind_of, alike)}
    return pd.concat([seeds.assign(kind=kind) for kind, seeds in kinds.items()], ignore_index=True)


def recipe(run: Run) -> list[dict[str, Any]]:
    """`what_counts` of each run of a whole training, but for names and kind of machine."""
    names = ("kind", "start_from")
    return [
        {key: value for key, value in what_counts(one).items() if key not in names}
        for one in lineage(run)
    ]


def without_seed(name: str) -> str:
    """What the runs of all seeds of a preset are called."""
    return re.sub(r"-seed\d+(-\d+)?$", "", name)


def parameters_of(run: Run) -> dict[str, Any]:
    """The configuration of a run. A parameter that did not exist yet when it was made has its
    default, which changes nothing; but for `statistics`, which stayed as they were."""
    return default_parameters() | {"statistics": "running"} | run.config


@functools.cache  # its checks build a network
def default_parameters() -> dict[str, Any]:
    return dataclasses.asdict(Settings())


def lineage(run: Run) -> list[Run]:
    """The runs of a whole training: those from whose weights each next one went on, and at last the
    given run, most often the only one.

    Raises:
        RunError: one of them is not on record.
    """
    before = run.config.get("start_from")
    if not before:
        return [run]
    try:
        return [*lineage(read_start(before, run.config["seed"])), run]
    except RunError as error:
        raise RunError(
            f"Run {run.name} went on from another, which cannot be read; restore that one, or "
            f"delete {place(run.folder)}. ({error})"
        ) from None


def read_start(name: str, seed: int) -> Run:
    """The run that `start_from` names: of that name or, if none is finished, of that name with the
    same seed, so that one preset can go on from the runs of another.

    Raises:
        RunError: there is neither, or it cannot be read.
    """
    known = names()
    for candidate in (name, f"{name}-seed{seed}"):
        if candidate in known:
            return read(candidate)
    raise RunError(
        f"Parameter start_from = {name!r}: there is no finished run {name} or {name}-seed{seed}; "
        f"make it with notebook 03, or name another (there are: {', '.join(known) or 'none'})."
    )


def whole_training(run: Run) -> Run:
    """A run whose history and batches begin with those of the runs that it went on from, the epochs
    counted on."""
    histories, batches, before = [], [], 0
    for one in lineage(run):
        histories.append(one.history.assign(epoch=one.history["epoch"] + before))
        batches.append(one.batches.assign(epoch=one.batches["epoch"] + before))
        before += len(one.history)
    history, batches = (pd.concat(parts, ignore_index=True) for parts in (histories, batches))
    return dataclasses.replace(run, history=history, batches=batches)


def image_sizes(run: Run) -> list[int]:
    """The size of the images in each epoch of a whole training."""
    return [
        settings.image_size(epoch)
        for settings in map(settings_of, lineage(run))
        for epoch in range(1, settings.epochs + 1)
    ]


def restarts(run: Run) -> list[int]:
    """The epochs of a whole training with which runs began that went on from another."""
    ends = itertools.accumulate(len(one.history) for one in lineage(run)[:-1])
    return [end + 1 for end in ends]


def training_seconds(run: Run) -> float:
    """The time of a whole training, with that of the runs that it went on from."""
    return sum(one.metrics["train_seconds"] for one in lineage(run))


def kind_of(run: Run) -> str:
    """What a run calculated with, such as CPU, AVX2, float32, for two threads, or that and their
    number; or the GPU. Only within a kind do times compare, and even there only roughly; and for
    the bits not even there."""

    def kind(hardware: dict[str, Any]) -> str:
        numbers = hardware.get("precision", "float32")
        if hardware["device"] == "cuda":
            return f"{hardware['gpu']}, {numbers}"
        threads = hardware["threads"]
        more = "" if threads == 2 else f", {threads} thread{'s' * (threads > 1)}"
        return f"CPU, {hardware.get('instructions', 'unknown')}, {numbers}{more}"

    return ", then ".join(dict.fromkeys(map(kind, hardware_of(run))))


def machine_of(run: Run) -> str:
    """What a run was made on, in words."""

    def machine(hardware: dict[str, Any]) -> str:
        cores = f"{hardware['threads']} CPU cores ({hardware['processor']}"
        details = [hardware[key] for key in ("instructions", "precision") if key in hardware]
        return hardware.get("gpu", ", ".join([cores, *details]) + ")")

    return ", then ".join(dict.fromkeys(map(machine, hardware_of(run))))


def machines_of(run: Run) -> str:
    """What a whole training was made on, in words."""
    return ", then ".join(dict.fromkeys(map(machine_of, lineage(run))))


def hardware_of(run: Run) -> list[dict[str, Any]]:
    """The machines that a run was made on, one after the other."""
    return [*run.metrics.get("begun_on", []), run.metrics["hardware"]]


def by_cost(dataset: str = "cifar10") -> pd.DataFrame:
    """Accuracy and cost of everything that was trained on all training images, a row for each.

    Columns: `run` (without its seed), `n` seeds, which `seeds` (as text), mean test `accuracy` and
    its standard `deviation` (fractions of one), mean `minutes` of training and their standard
    deviation (`minutes_deviation`), the `kind` of machine, and `work`, the multiply-adds of a whole
    training: those of each image forward, as the formula is written, and as many again for each of
    the two gradients. In the order in which the first seed was finished. Runs on different kinds
    of machine are rows of their own.
    """
    columns = [
        "run", "n", "seeds", "accuracy", "deviation", "minutes", "minutes_deviation", "kind",
        "work",
    ]  # fmt: skip
    rows, known, among = [], [], finished()
    for run in sorted(among, key=lambda one: one.metrics["finished"]):
        config = run.config
        if config["dataset"] != dataset or config["validation"] or config["train_images"]:
            continue
        if what_counts(run) in known:
            continue
        known.append(what_counts(run))
        seeds = seeds_of(run, among)
        accuracy, minutes = seeds["test_accuracy"], seeds["train_seconds"] / 60
        name = without_seed(run.name)
        which = ", ".join(map(str, sorted(seeds["seed"])))
        found = accuracy.mean(), accuracy.std(), minutes.mean(), minutes.std()
        rows.append((name, len(seeds), which, *found, kind_of(run), training_work(run)))
    return pd.DataFrame(rows, columns=columns)


# Choices whose base has another name than theirs would say.
BESIDE = dict.fromkeys(("choice-small-first", "choice-two-3x3-three-epochs"), "choice-whole")


def choices(dataset: str = "cifar10") -> pd.DataFrame:
    """The finished runs that were made to choose by, with images held out; a row a run.

    Columns: `run`, `images` (trained on), `epochs`, `beside` (the run it is compared with: the one
    named `<begin>-base` with the longest beginning of its own name, or that in `BESIDE`; itself, if
    there is none of as many images), `what differs` from that one, and `validation accuracy`.
    """
    columns = ["run", "images", "epochs", "beside", "what differs", "validation accuracy"]
    found = {run.name: run for run in finished() if run.metrics["preset"] == "choice"}
    rows = []
    for name, run in found.items():
        if run.metrics["dataset"] != dataset:
            continue
        begins = (base.removesuffix("base") for base in found if base.endswith("-base"))
        begin = max((b for b in begins if name.startswith(b) and name != b + "base"), default="")
        beside, config = found.get(BESIDE.get(name, begin + "base"), run), run.config
        images = settings_of(run).images_of(TRAINING_IMAGES)
        if settings_of(beside).images_of(TRAINING_IMAGES) != images:
            beside = run
        row = name, images, config["epochs"], beside.name, differences(run, beside)
        rows.append((*row, run.metrics["validation_accuracy"]))
    return pd.DataFrame(rows, columns=columns)


def differences(run: Run, other: Run) -> str:
    """The parameters in which a run differs from another, with its own values; but for those that
    `choices` has columns for, or that do not change the training."""
    passed_over = (*NOT_OF_THE_TRAINING, "train_images", "epochs")
    others = parameters_of(other)
    changed = [
        f"{key} = {value}"
        for key, value in parameters_of(run).items()
        if key not in passed_over and value != others.get(key)
    ]
    return ", ".join(changed) or "–"


def training_work(run: Run, how: str = "as written") -> float:
    """The multiply-adds of a whole training, with that of the runs that it went on from: see
    `work_of`."""
    work = 0.0
    for one in lineage(run):
        images = one.history["images_per_second"] * one.history["seconds"]
        work += work_of(settings_of(one), images.tolist(), how)
    return work


def work_of(settings: Settings, images: list[float], how: str = "as written") -> float:
    """The multiply-adds, forward and backward, of epochs of so many images each.

    Args:
        images: seen in each epoch.
        how: `"as written"`, or `"as evaluated"`: in the forms that the blocks take on a CPU.
    """
    sizes = [settings.image_size(epoch) for epoch in range(1, len(images) + 1)]
    work = 0.0
    for size in set(sizes):
        if how == "as written":
            forward = work_as_written(settings.architecture(), size)
        else:
            forward = layer_table(settings.network(), size)[f"multiply-adds {how}"].sum()
        work += 3.0 * float(forward) * sum(n for n, own in zip(images, sizes) if own == size)
    return work


@functools.cache
def work_as_written(architecture: str, size: int) -> float:
    """The multiply-adds of a network, `Settings.architecture`, for one image of that height and
    width, forward and as the formula is written."""
    with torch.device("meta"):  # its weights do not matter
        layers = layer_table(BlockNetwork(**json.loads(architecture)), size)
    return float(layers["multiply-adds as written"].sum())


def benchmark(table: str, folder: Path | None = None) -> pd.DataFrame:
    """A table that `make bench` has measured, see `CPU_TABLES`.

    Args:
        folder: of the kind of machine; None for the CPU measured last.

    Raises:
        RunError: there is no such table.
    """
    path = (folder or latest_benchmark()) / f"{table}.csv"
    if not path.is_file():
        raise RunError(f"{place(path)} is missing; `make bench` measures it.")
    return pd.read_csv(path)


def latest_benchmark() -> Path:
    """The folder of the CPU that was measured last, of those of which all tables are there.

    Raises:
        RunError: there is none.
    """
    for folder in reversed(benchmark_folders()):
        if all((folder / f"{table}.csv").is_file() for table in CPU_TABLES):
            return folder
    raise RunError(f"There is no whole benchmark in {place(BENCHMARKS)}; `make bench` makes one.")


def benchmark_aims() -> pd.DataFrame:
    """What was aimed at for four branches of 3×3 kernels, and what every machine that was measured
    reached, a row for each and its number type.

    Columns: the time of a block as built, over one plain convolution of its shape (lowest and
    highest of the shapes on maps of that size), and that of a step of the preset `quick`, over the
    step with one branch (the quicker one, as built or as written), and how much each branch more
    adds from one to four, and from four to eight, as a share of the step with one.
    """
    columns = [
        "block, ≥ 16×16", "block, 8×8", "step over quickest of L = 1", "a branch more, L = 1 to 4",
        "a branch more, L = 4 to 8",
    ]  # fmt: skip
    rows = {("aimed at", ""): ["≤ 1.5", "≤ 2.5", "≤ 1.5", "< 8%", "< 8%"]}
    for folder in [*benchmark_folders(), *benchmark_folders("cuda")]:
        steps = benchmark("steps", folder)
        hardware = read_json(folder / "machine.json")["hardware"]
        if "precision" not in steps:  # measured in one number type, that of the machine
            steps["precision"] = hardware.get("precision", "float32")
        for precision, own in steps.groupby("precision", sort=False):
            time = own.pivot(index="L", columns="form", values="milliseconds")
            one, four, eight = time.loc[1].min(), time["auto"][4], time["auto"][8]
            rows[folder.name, precision] = [
                *_block_ratios(folder, precision), f"{four / one:.1f}",
                *(f"{more / one:.0%}" for more in ((four - one) / 3, (eight - four) / 4)),
            ]  # fmt: skip
    index = pd.MultiIndex.from_tuples(rows, names=["machine", "numbers"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def _block_ratios(folder: Path, precision: str) -> list[str]:
    """Of `benchmark_aims`: lowest and highest ratio on large maps and on those of 8×8."""
    if not (folder / "blocks.csv").is_file():
        return ["–", "–"]
    blocks = benchmark("blocks", folder)
    mine = (blocks["L"] == 4) & (blocks["form"] == "auto") & (blocks["precision"] == precision)
    sizes = blocks["map"][mine], blocks["ratio"][mine]
    parts = [sizes[1][sizes[0] >= 16], sizes[1][sizes[0] == 8]]
    return [" to ".join(dict.fromkeys(f"{r:.1f}" for r in (p.min(), p.max()))) for p in parts]


def benchmark_folders(device: str = "cpu", having: str | None = None) -> list[Path]:
    """The folders of what `make bench` has measured on CPUs, or on GPUs (`"cuda"`), one a kind, the
    latest last; only those in which there is the table `having`, if one is named."""
    machines = {path.parent: read_json(path) for path in BENCHMARKS.glob("*/machine.json")}
    of_device = [folder for folder in machines if machines[folder]["hardware"]["device"] == device]
    if having:
        of_device = [folder for folder in of_device if (folder / f"{having}.csv").is_file()]
    return sorted(of_device, key=lambda folder: machines[folder]["finished"])


def benchmark_machine(folder: Path | None = None) -> str:
    """The machine of a folder, or the CPU that was measured last, in a few words."""
    hardware = read_json((folder or latest_benchmark()) / "machine.json")["hardware"]
    cpu = f"{hardware['processor']}, {hardware['threads']} threads, {hardware['instructions']}"
    return hardware.get("gpu", cpu)
