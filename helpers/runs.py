"""What a run is: its record in `notebooks/runs/<name>/`, read, and the tables over records.

A record holds `config.json` (the parameters), `history.csv` (a row an epoch), `batches.csv` (a row
a training batch), `metrics.json` (what came out, on what machine) and, where kept, `weights.pt`.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from helpers import project
from helpers.data import ImageData
from helpers.model import BlockNetwork
from helpers.project import ProjectError, nearest, shown
from helpers.settings import Settings

METRICS = (
    "dataset", "preset", "seed", "epochs", "test_accuracy", "test_accuracy_tta",
    "training_accuracy", "train_seconds", "parameters", "finished", "hardware", "weights_sha256",
)  # fmt: skip


class RunError(ProjectError):
    """A record that cannot be read or written; the message names it and the remedy."""


@dataclass(frozen=True)
class Run:
    """A finished run; accuracies are fractions of one, times seconds."""

    name: str
    config: dict[str, Any]
    history: pd.DataFrame  # a row an epoch
    batches: pd.DataFrame  # a row a training batch
    metrics: dict[str, Any]

    @property
    def folder(self) -> Path:
        return project.RUNS / self.name

    @property
    def settings(self) -> Settings:
        """The parameters it was made with."""
        return Settings(**{key: self.config[key] for key in self.config if key != "dataset"})


def read(name: str) -> Run:
    """A finished run.

    Raises:
        RunError: there is no such run, it is not finished, or its record cannot be used.
    """
    folder = project.RUNS / name
    if not name or not folder.is_dir():
        known = sorted(path.parent.name for path in project.RUNS.glob("*/config.json"))
        raise RunError(f"There is no run {name!r} in notebooks/runs: {nearest(name, known)}.")
    if not (folder / "metrics.json").is_file():
        raise RunError(
            f"Run {name} is not finished; notebook 03 with the same parameters continues it."
        )
    config, metrics = read_json(folder / "config.json"), read_json(folder / "metrics.json")
    try:
        history, batches = (pd.read_csv(folder / f"{part}.csv") for part in ("history", "batches"))
        run = Run(name, config, history, batches, metrics)
        if lacking := [key for key in METRICS if key not in metrics]:
            raise ValueError(f"{', '.join(lacking)} is missing")
        if history.empty or batches.empty or config["dataset"] != metrics["dataset"]:
            raise ValueError("its parts do not fit together")
        run.settings  # noqa: B018  # parameters of this version?
    except (OSError, KeyError, ValueError, ProjectError) as error:
        raise RunError(
            f"The record of run {name} cannot be used ({error!s:.80}); restore it, or delete "
            f"{shown(folder)}."
        ) from None
    return run


def finished() -> list[Run]:
    """All finished runs, by name; a record that cannot be used is named in a line and left out."""
    runs = []
    for path in sorted(project.RUNS.glob("*/metrics.json")):
        try:
            runs.append(read(path.parent.name))
        except RunError as error:
            print(f"Left out: {error}")
    return runs


def read_json(path: Path) -> dict[str, Any]:
    """The content of a record's file; a RunError if there is none, or no names and values in it."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise RunError(
            f"{shown(path)} cannot be read ({type(error).__name__}); restore it, or delete its "
            "folder."
        ) from None


def check_same_data(run: Run, images: ImageData) -> None:
    """Raise a RunError unless the run was trained on these data."""
    if run.metrics["dataset"] != images.name:
        raise RunError(
            f"Run {run.name} was trained on {run.metrics['dataset']}, and the data here is "
            f"{images.name}: name a run on this data, or make one with notebook 03."
        )


def load_network(run: Run) -> BlockNetwork:
    """The trained network of a run, in evaluation mode; a RunError if its weights are not here, or
    are not those that the run wrote."""
    path = run.folder / "weights.pt"
    if not path.is_file():
        raise RunError(
            f"Run {run.name} has no weights here ({shown(path)}); name a run that has, or make it "
            "again under another name with notebook 03."
        )
    network = run.settings.network().to(memory_format=torch.channels_last)
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != run.metrics["weights_sha256"]:
            raise ValueError("another checksum")
        weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        network.load_state_dict(weights)
    except Exception as error:  # whatever a damaged file leads to
        raise RunError(
            f"{shown(path)} is not what run {run.name} wrote ({type(error).__name__}); restore it, "
            "or make the run again."
        ) from None
    return network.eval()


def figure_label(settings: Settings, dataset: str) -> str:
    """The folder in `figures/`: the run's name, of seed 0 without its seed; or the stand-in's."""
    return settings.run_name.removesuffix("-seed0") if dataset == "cifar10" else dataset


# ---- tables over runs


def hardware_of(run: Run) -> str:
    """What a run was made on, in words."""
    made_on = run.metrics["hardware"]
    if "gpu" in made_on:
        return f"{made_on['gpu']} ({made_on['precision']})"
    cores = {1: "one CPU core", 2: "two CPU cores"}
    threads = cores.get(made_on["threads"], f"{made_on['threads']} CPU cores")
    return f"{threads} ({made_on['processor']}, {made_on['precision']})"


def training_of(run: Run) -> dict[str, Any]:
    """What decides a run's accuracy, but for its seed and machine."""
    ignored = ("preset", "seed", "run", "device", "precision")
    return {key: value for key, value in run.config.items() if key not in ignored}


def seeds_of(run: Run, among: list[Run] | None = None) -> pd.DataFrame:
    """The metrics of all finished runs like this one, of other seeds or machines; a row a run, with
    its name in `run`; `hardware` is in words."""
    alike = [one for one in among or finished() if training_of(one) == training_of(run)]
    rows = [{"run": one.name} | one.metrics | {"hardware": hardware_of(one)} for one in alike]
    return pd.DataFrame(rows).sort_values(["hardware", "seed"], ignore_index=True)


def results() -> pd.DataFrame:
    """What the recipes on record reach on CIFAR-10, trained on all images; a row for each recipe
    and machine, the quickest first: one `run`, `preset`, `hardware` in words, `parameters`, `n`
    seeds, mean `accuracy` ± `deviation`, `tta` ± `tta_deviation` (six views; fractions), `minutes`
    ± `minutes_deviation` of training."""
    subset, rows = ("validation", "train_images", "test_images"), []
    for run in finished():
        if run.metrics["dataset"] == "cifar10" and not any(run.config[key] for key in subset):
            measured = run.metrics["test_accuracy"], run.metrics["test_accuracy_tta"]
            minutes, parameters = run.metrics["train_seconds"] / 60, run.metrics["parameters"]
            recipe = json.dumps(training_of(run), sort_keys=True), hardware_of(run)
            rows.append((*recipe, run.name, run.config["preset"], parameters, *measured, minutes))
    columns = ["recipe", "hardware", "run", "preset", "parameters", "accuracy", "tta", "minutes"]
    groups = pd.DataFrame(rows, columns=columns).groupby(["recipe", "hardware"], sort=False)
    table = groups.agg(
        run=("run", "first"), preset=("preset", "first"), parameters=("parameters", "first"),
        n=("run", "size"), accuracy=("accuracy", "mean"), deviation=("accuracy", "std"),
        tta=("tta", "mean"), tta_deviation=("tta", "std"),
        minutes=("minutes", "mean"), minutes_deviation=("minutes", "std"),
    )  # fmt: skip
    return table.reset_index("hardware").sort_values("minutes", ignore_index=True)


def history() -> pd.DataFrame:
    """What earlier recipes reached, `notebooks/runs/history.csv`: `name`, `recipe` in words,
    `accuracy` ± `deviation` and `tta` (fractions), `n`, `minutes`, `machine`, `commit`."""
    return pd.read_csv(project.RUNS / "history.csv")
