"""What a run is: its record in `notebooks/runs/<name>/`, read and written, and tables over records.

A record holds `config.json` (the parameters), `history.csv` (one row per epoch), `batches.csv` (one
per training batch), `metrics.json` (what came out, on what machine) and, where kept, `weights.pt`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock, Timeout

from helpers import mixing, project
from helpers.data import ImageData
from helpers.model import BlockNetwork
from helpers.project import ProjectError, did_you_mean, short, write_file
from helpers.settings import Settings


class RunError(ProjectError):
    """A record that cannot be read or written; the message names it and the remedy."""


@dataclass(frozen=True)
class Run:
    """A finished run; accuracies are fractions of one, times seconds."""

    name: str
    config: dict[str, Any]
    history: pd.DataFrame  # one row per epoch
    batches: pd.DataFrame  # one row per training batch
    metrics: dict[str, Any]

    @property
    def folder(self) -> Path:
        return project.RUNS / self.name

    @cached_property
    def settings(self) -> Settings:
        """The parameters it was made with."""
        return Settings(**{key: self.config[key] for key in self.config if key != "dataset"})


def read(name: str) -> Run:
    """The finished run of that name; a RunError if its record is not there or cannot be used."""
    folder = project.RUNS / name
    if not name or not folder.is_dir():
        known = sorted(path.parent.name for path in project.RUNS.glob("*/config.json"))
        raise RunError(f"There is no run {name!r:.60} here: {did_you_mean(name, known)}.")
    if not (folder / "metrics.json").is_file():
        raise RunError(f"Run {name} is not finished; resume it in notebook 03.")
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    try:
        history, batches = (pd.read_csv(folder / f"{part}.csv") for part in ("history", "batches"))
        run = Run(name, config, history, batches, metrics)
        whole = len(history) == metrics["epochs"] and "loss" in batches
        whole = whole and {"size", "test_accuracy"} <= {*history}
        if not whole or config["dataset"] != metrics["dataset"]:
            raise ValueError("its files do not fit together")
        table([run])  # has it all, in parameters of this version?
    except (OSError, KeyError, TypeError, ValueError, ProjectError) as error:
        why = f"{type(error).__name__}: {error!s:.80}"
        raise RunError(f"Run {name} cannot be used ({why}); restore or delete it.") from None
    return run


def finished() -> list[Run]:
    """All finished runs, by name; a record that cannot be used is named in a line and left out."""
    runs = []
    for path in sorted(project.RUNS.glob("*/metrics.json")):
        try:
            runs.append(read(path.parent.name))
        except RunError as error:
            print(f"Skipped: {error}")
    return runs


def read_json(path: Path) -> dict[str, Any]:
    """The content of a record's file; a RunError if there is none, or no names and values in it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        why = f"{short(path)} cannot be read ({type(error).__name__})"
        raise RunError(f"{why}; restore it, or delete its folder.") from None


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A table of earlier results; a RunError if it cannot be read or lacks one of the columns."""
    try:
        table = pd.read_csv(path)
        table[list(columns)]
        return table
    except (OSError, ValueError, KeyError) as error:
        kind = type(error).__name__
        raise RunError(f"{short(path)} cannot be read ({kind}); restore it.") from None


def check_same_data(run: Run, images: ImageData) -> None:
    """Raise a RunError unless the run was trained on these data."""
    if run.metrics["dataset"] != images.name:
        on = run.metrics["dataset"]
        raise RunError(f"Run {run.name} was trained on {on}, not {images.name}; choose another.")


def load_network(run: Run) -> BlockNetwork:
    """A run's network, in evaluation mode; a RunError if its weights are not those it wrote."""
    path = run.folder / "weights.pt"
    with torch.random.fork_rng(devices=[]):
        network = run.settings.network().to(memory_format=torch.channels_last)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != run.metrics["weights_sha256"]:
            raise ValueError("checksum mismatch")
        weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        network.load_state_dict(weights)
    except Exception as error:  # whatever a missing or damaged file leads to
        raise RunError(
            f"Run {run.name} has no usable weights ({short(path)}: "
            f"{type(error).__name__}); restore them, or choose another run."
        ) from None
    return network.eval()


def figure_label(settings: Settings, dataset: str) -> str:
    """The folder in `figures/`: the run's name, of seed 0 without its seed; or the stand-in's."""
    return settings.run_name.removesuffix("-seed0") if dataset == "cifar10" else dataset


def hardware_of(run: Run) -> str:
    """What a run was made on, in words."""
    made_on = run.metrics["hardware"]
    if "gpu" in made_on:
        return f"{made_on['gpu']} ({made_on['precision']})"
    n = made_on["threads"]
    cores = {1: "one CPU core", 2: "two CPU cores"}.get(n, f"{n} CPU cores")
    return f"{cores} ({made_on['processor']}, {made_on['precision']})"


def reference_epochs(run: Run) -> float:
    """A run's training time in epochs of the plain network of six 3×3 convolutions at 32 pixels, as
    `make bench` measured them on its machine, which makes machines comparable. NaN if not."""
    made_on = run.metrics["hardware"]
    machine = f"{made_on.get('processor')}, {made_on.get('threads')} threads"
    for path in project.BENCHMARKS.glob("*-threads.csv"):
        with contextlib.suppress(RunError):  # a damaged table says nothing about others
            for row in read_table(
                path, "machine", "precision", "what", "milliseconds"
            ).itertuples():
                found = (row.machine, row.precision) == (machine, made_on["precision"])
                if found and row.what.startswith("reference") and "gpu" not in made_on:
                    return run.metrics["train_seconds"] / (row.milliseconds / 10)
    return float("nan")


NUMBERS = ("test_accuracy", "test_accuracy_tta", "train_seconds", "parameters")


def table(runs: list[Run]) -> pd.DataFrame:
    """One row per run: its name in `run`, `preset`, `seed`, `hardware` in words, in `recipe` all
    that decides its accuracy but for seed and machine, and the `NUMBERS` of its metrics."""
    rows, no_recipe = [], {"preset", "seed", "run", "device", "precision"}
    for run in runs:
        settings, numbers = run.settings, [float(run.metrics[name]) for name in NUMBERS]
        if not all(0 <= share <= 1 for share in numbers[:2]):
            raise ValueError("accuracies are fractions of one")
        recipe = run.metrics["dataset"] + settings.model_dump_json(exclude=no_recipe)
        known = run.name, settings.preset, settings.seed, hardware_of(run), recipe
        rows.append((*known, *numbers))
    columns = ["run", "preset", "seed", "hardware", "recipe", *NUMBERS]
    once = ["seed", "hardware", "recipe"]  # a run that was repeated counts once
    return pd.DataFrame(rows, columns=columns).drop_duplicates(once, ignore_index=True)


def seeds_of(run: Run) -> pd.DataFrame:
    """The rows of all finished runs like this one, of other seeds or machines."""
    rows, recipe = table(finished()), table([run])["recipe"][0]
    return rows[rows["recipe"] == recipe].sort_values(["hardware", "seed"], ignore_index=True)


def results() -> pd.DataFrame:
    """What the recipes on record reach on all of CIFAR-10; a row for each recipe and machine, the
    quickest first: `preset`, `hardware` in words, `n` seeds, mean `accuracy` ± `deviation`, `tta`
    (six views; fractions), `minutes` and `reference_epochs` of training."""
    subset = ("validation", "train_images", "test_images")
    whole = [run for run in finished() if not any(map(run.config.get, subset))]
    whole = {run.name: run for run in whole if run.metrics["dataset"] == "cifar10"}
    rows = table([*whole.values()])
    rows = rows.assign(
        minutes=rows["train_seconds"] / 60,
        reference_epochs=[reference_epochs(whole[name]) for name in rows["run"]],
    )
    means = rows.groupby(["recipe", "hardware"]).agg(
        preset=("preset", "first"), n=("run", "size"), accuracy=("test_accuracy", "mean"),
        deviation=("test_accuracy", "std"), tta=("test_accuracy_tta", "mean"),
        minutes=("minutes", "mean"), reference_epochs=("reference_epochs", "mean"),
    )  # fmt: skip
    return means.reset_index("hardware").sort_values("minutes", ignore_index=True)


def history() -> pd.DataFrame:
    """What earlier recipes reached, `notebooks/runs/history.csv`: `name`, `recipe` in words,
    `accuracy` ± `deviation` and `tta` (fractions), `n`, `minutes`, `machine`, `commit`."""
    return read_table(project.RUNS / "history.csv")


class RunWriter:
    """A run that is being written: what is known after an epoch is on disk after that epoch.

    In a `with` statement, which locks the record. A run that was begun under this name and not
    finished is continued; if it is another run's, a RunError says so. A full disk does not stop the
    training: `say` is called with a sentence, and the next writing tries again.
    """

    def __init__(
        self, settings: Settings, dataset: str, say: Callable[[str], None] = print
    ) -> None:
        self.say = say
        self.config = settings.model_dump(mode="json") | {"dataset": dataset}
        self.name = settings.run or free_name(settings.run_name, self.config)
        self.folder = project.RUNS / self.name
        self.config["run"] = self.name
        self.checkpoints = self.folder / "checkpoint.pt", self.folder / "checkpoint-before.pt"
        self.lock = FileLock(self.folder / ".lock", timeout=0)
        self.epochs: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.interruptions = 0

    def __enter__(self) -> RunWriter:
        config = self.folder / "config.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock:  # re-entrant: acquired again below
                if not config.is_file():
                    write_file(config, as_json(self.config))
                begun = read_json(config)
                if other := [key for key in self.config if begun.get(key) != self.config[key]]:
                    why = f"Run {self.name} was started with different {', '.join(other[:3])}"
                    raise RunError(f"{why}; choose another name with the parameter run.")
                self.lock.acquire()  # once more: held until __exit__
        except Timeout:
            raise RunError(
                f"Run {self.name} is being written by another process; wait for it to finish."
            ) from None
        except OSError as error:
            why = f"{short(self.folder)} cannot be written ({error.strerror})"
            raise RunError(f"{why}; free some space, or use a copy that you may write.") from None
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        self.lock.release()
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "allocate memory" in str(error):
            remedy = "free some and restart it, or use fewer channels under another run name"
            raise RunError(f"Run {self.name} ran out of memory; {remedy}.") from None
        if (self.folder / "metrics.json").is_file():
            (self.folder / ".lock").unlink(missing_ok=True)

    def finished(self) -> Run | None:
        """The run, if it is finished already."""
        return read(self.name) if (self.folder / "metrics.json").is_file() else None

    def checkpoint(self) -> dict[str, Any] | None:
        """The training state of the latest checkpoint that can be used, or None. One that cannot is
        moved aside, so that it never takes the place of a good one."""
        for path in filter(Path.is_file, self.checkpoints):
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                if state["config"] != self.config:
                    raise ValueError("it belongs to another run")
                training = state["training"]
                self.epochs, self.batches = state["epochs"], state["batches"]
                self.interruptions = state["interruptions"] + 1
                return training
            except (OSError, MemoryError):
                raise  # nothing may be wrong with the file
            except Exception as error:  # whatever a damaged file leads to
                why = f"{type(error).__name__}: {error}".splitlines()[0][:80]
                self.say(f"{short(path)} is not used ({why}); it is kept as {path.stem}-bad.pt.")
                path.replace(path.with_name(f"{path.stem}-bad.pt"))
        return None

    def save(self, training: dict[str, Any]) -> None:
        """Write a checkpoint with this training state; the one before is kept beside it."""
        names = ("config", "epochs", "batches", "interruptions")
        state = {name: getattr(self, name) for name in names} | {"training": training}
        self.write(self.checkpoints[0], lambda file: torch.save(state, file), self.checkpoints[1])

    def write(self, path: Path, content: Any, keep: Path | None = None) -> bool:
        """`write_file`, but a failure is only reported, and training continues."""
        try:
            write_file(path, content, keep)
        except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
            why = getattr(error, "strerror", None) or "perhaps the disk is full"
            self.say(f"{short(path)} could not be written ({why}); training continues.")
            return False
        return True

    def add_epoch(self, row: dict[str, Any], batches: list[dict[str, Any]]) -> None:
        """Add an epoch's row of `history.csv` and its rows of `batches.csv`."""
        self.epochs.append(row)
        self.batches += batches
        self.write_tables()

    def write_tables(self) -> bool:
        tables = {"history": self.epochs, "batches": self.batches}
        texts = {name: pd.DataFrame(rows).to_csv(index=False) for name, rows in tables.items()}
        return all([self.write(self.folder / f"{name}.csv", text) for name, text in texts.items()])

    def finish(self, network: BlockNetwork, metrics: dict[str, Any]) -> Run:
        """Write weights and metrics, remove the checkpoints, and give the finished run. Where not
        all of it can be written the run stays unfinished, and its checkpoints stay."""
        learned = network.state_dict().items()  # already rounded: training.round_to_half
        weights = {name: x.half() if x.is_floating_point() else x for name, x in learned}
        file = io.BytesIO()
        torch.save(weights, file)
        checksum = hashlib.sha256(file.getvalue()).hexdigest()
        metrics |= {"interruptions": self.interruptions, "weights_sha256": checksum}
        written = self.write(self.folder / "weights.pt", file.getvalue()) & self.write_tables()
        if written and self.write(self.folder / "metrics.json", as_json(metrics)):
            for path in self.checkpoints:
                path.unlink(missing_ok=True)
        else:
            self.say(f"Run {self.name} is still unfinished: free some space, and restart it.")
        tables = pd.DataFrame(self.epochs), pd.DataFrame(self.batches)
        return Run(self.name, self.config, *tables, metrics)


def free_name(stem: str, config: dict[str, Any]) -> str:
    """The first of `stem`, `stem-2`, `stem-3` … that no other run has: one that is free, or that is
    a run of these parameters, unfinished or with its weights."""
    name, number = stem, 2
    while (folder := project.RUNS / name).is_dir():
        with contextlib.suppress(RunError):
            kept = (folder / "weights.pt").exists() or not (folder / "metrics.json").exists()
            if kept and read_json(folder / "config.json") == config | {"run": name}:
                break
        name, number = f"{stem}-{number}", number + 1
    return name


def surroundings(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """When and on what something was made: `finished`, `hardware`, `versions`."""
    linux = Path("/proc/cpuinfo")
    named = linux.is_file() and re.search(r"model name\s*: (.*)", linux.read_text(encoding="utf-8"))
    hardware: dict[str, Any] = {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
        "precision": str(precision).removeprefix("torch."),
        "mixed": device.type == "cpu" and not mixing.unavailable(),
    }
    if device.type != "cpu":
        is_cuda = device.type == "cuda"
        hardware["gpu"] = torch.cuda.get_device_name(device) if is_cuda else "Apple GPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {"finished": finished, "hardware": hardware, "versions": versions}


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
