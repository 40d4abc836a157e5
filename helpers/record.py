"""A run that is being written: its record grows epoch by epoch, and survives being killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from filelock import FileLock, Timeout

from helpers import mixing, project
from helpers.model import BlockNetwork
from helpers.project import shown, write_file
from helpers.runs import Run, RunError, read, read_json
from helpers.settings import Settings


class Record:
    """A run that is being written. Whatever is known after an epoch is on disk after that epoch.

    A run that was begun under this name and not finished is continued, with the same parameters on
    the same data. Files are moved into place whole. A full disk does not stop the training: it is
    said, and the next writing tries again. Used in a `with` statement, which locks the record.

    Args:
        say: called with a sentence about what was continued or could not be written.

    Raises:
        RunError: on entering, if the name is taken by another run, or the folder cannot be written.
    """

    def __init__(
        self, settings: Settings, dataset: str, say: Callable[[str], None] = print
    ) -> None:
        self.say = say
        self.config = settings.model_dump(mode="json") | {"dataset": dataset}
        self.name = settings.run or free_name(settings.run_name, self.config)
        self.folder = project.RUNS / self.name
        self.config["run"] = self.name
        self.epochs: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.interruptions = 0

    def __enter__(self) -> Record:
        """Lock the folder, and refuse a name under which another run was begun."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.folder / ".lock", timeout=0)
            self.lock.acquire()
            if not (self.folder / "config.json").is_file():
                write_file(self.folder / "config.json", as_json(self.config))
        except Timeout:
            raise RunError(
                f"Run {self.name} is under way in another process; wait for it, or choose another "
                "name with the parameter run."
            ) from None
        except OSError as error:
            raise RunError(
                f"{shown(self.folder)} cannot be written ({error.strerror}); make room, or give "
                "yourself the right to write there."
            ) from None
        begun = read_json(self.folder / "config.json")
        for key, value in self.config.items():
            if begun.get(key) != value:
                self.lock.release()
                raise RunError(
                    f"Run {self.name} was begun with {key} = {begun.get(key)!r:.50}, and now it is "
                    f"{value!r:.50}; choose another name with the parameter run, or delete "
                    f"{shown(self.folder)}."
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        if (self.folder / "metrics.json").is_file():
            (self.folder / ".lock").unlink(missing_ok=True)

    def finished(self) -> Run | None:
        """The run, if it is finished already. Raises a RunError if its weights were not kept."""
        if not (self.folder / "metrics.json").is_file():
            return None
        if not (self.folder / "weights.pt").is_file():
            raise RunError(
                f"Run {self.name} is finished, but its weights are not here; choose another name "
                "with the parameter run."
            )
        return read(self.name)

    def checkpoint(self) -> dict[str, Any] | None:
        """The training state of the latest checkpoint that can be used, or None. One that cannot is
        moved aside, so that it never takes the place of a good one."""
        for path in filter(Path.is_file, self.checkpoint_paths()):
            try:
                state = torch.load(path, weights_only=True, map_location="cpu")
                if state["config"] != self.config:
                    raise ValueError("it belongs to another run")
            except Exception as error:  # whatever a damaged file leads to
                why = f"{type(error).__name__}: {error}".splitlines()[0][:80]
                if isinstance(error, OSError | MemoryError) or "allocate memory" in why:
                    raise RunError(  # nothing may be wrong with the file
                        f"{shown(path)} cannot be read now ({why}); start the run again when the "
                        "machine can."
                    ) from None
                self.say(f"{shown(path)} is not used ({why}); it is kept as {path.stem}-bad.pt.")
                path.replace(path.with_name(f"{path.stem}-bad.pt"))
                continue
            self.epochs, self.batches = state["epochs"], state["batches"]
            self.interruptions = state["interruptions"] + 1
            return state["training"]
        return None

    def save(self, training: dict[str, Any]) -> None:
        """Write a checkpoint with this training state; the one before is kept beside it."""
        names = ("config", "epochs", "batches", "interruptions")
        state = {name: getattr(self, name) for name in names} | {"training": training}
        latest, before = self.checkpoint_paths()
        self.write(latest, lambda file: torch.save(state, file), before)

    def checkpoint_paths(self) -> tuple[Path, Path]:
        return self.folder / "checkpoint.pt", self.folder / "checkpoint-before.pt"

    def write(self, path: Path, content: Any, keep: Path | None = None) -> bool:
        """`write_file`, but where that fails it is said, and the training goes on."""
        try:
            write_file(path, content, keep)
        except (OSError, RuntimeError) as error:  # torch.save makes the one of the other
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            self.say(f"{shown(path)} could not be written ({reason}); the training goes on.")
            return False
        return True

    def add_epoch(self, row: dict[str, Any], batches: list[dict[str, Any]]) -> bool:
        """Add an epoch's row of `history.csv` and its rows of `batches.csv`."""
        self.epochs.append(row)
        self.batches += batches
        return self.write_tables()

    def write_tables(self) -> bool:
        tables = {"history": self.epochs, "batches": self.batches}
        texts = {name: pd.DataFrame(rows).to_csv(index=False) for name, rows in tables.items()}
        return all([self.write(self.folder / f"{name}.csv", text) for name, text in texts.items()])

    def finish(self, network: BlockNetwork, metrics: dict[str, Any]) -> Run:
        """Write weights and metrics, remove the checkpoints, and give the finished run. Where not
        all of it can be written the run stays unfinished, and its checkpoints stay."""
        weights = {
            name: value.half() if value.is_floating_point() else value  # see training.round_to_half
            for name, value in network.state_dict().items()
        }
        content = io.BytesIO()
        torch.save(weights, content)
        checksum = hashlib.sha256(content.getvalue()).hexdigest()
        metrics |= {"interruptions": self.interruptions, "weights_sha256": checksum}
        written = self.write(self.folder / "weights.pt", content.getvalue()) & self.write_tables()
        if written and self.write(self.folder / "metrics.json", as_json(metrics)):
            for path in self.checkpoint_paths():
                path.unlink(missing_ok=True)
        else:
            self.say(f"Run {self.name} stays unfinished: make room, and start it again.")
        tables = pd.DataFrame(self.epochs), pd.DataFrame(self.batches)
        return Run(self.name, self.config, *tables, metrics)


def free_name(stem: str, config: dict[str, Any]) -> str:
    """The first of `stem`, `stem-2`, `stem-3` … that no other run has: one that is free, or that is
    a run of these parameters, unfinished or with its weights."""
    name, number = stem, 2
    while (folder := project.RUNS / name).is_dir():
        with contextlib.suppress(RunError):
            same = read_json(folder / "config.json") == config | {"run": name}
            if same and (
                (folder / "weights.pt").exists() or not (folder / "metrics.json").exists()
            ):
                break
        name, number = f"{stem}-{number}", number + 1
    return name


def surroundings(device: torch.device, precision: torch.dtype) -> dict[str, Any]:
    """When and on what something was made: `finished`, `hardware`, `versions`."""
    hardware: dict[str, Any] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
        "precision": str(precision).removeprefix("torch."),
        "mixed": device.type == "cpu" and not mixing.unavailable(),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__}  # fmt: skip
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {"finished": finished, "hardware": hardware, "versions": versions}


def processor() -> str:
    """The processor's name, as Linux gives it, or else the kind of machine."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def as_json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
