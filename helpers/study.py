"""Variants of one network, trained from several seeds and compared: `make study`.

`notebooks/runs/study.yaml` lists them in groups. Each run is evaluated on 5,000 validation images
and becomes a row of `study.csv` beside it; what is there is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from collections.abc import Iterator
from typing import Any

import joblib
import pandas as pd
import torch
from pydantic import Field
from statsmodels.formula.api import ols

from helpers import data, evaluation, project, runs, training
from helpers.model import layer_table
from helpers.project import ProjectError, exit_with_message, write_file
from helpers.settings import Checked, ParameterError, Settings, read_yaml, six_blocks

KEY = ["group", "variant", "seed"]


class Plan(Checked):
    """A group of `study.yaml`: what `all` its runs share, and in what each variant differs. In a
    `ladder` each variant keeps what those before it have changed."""

    seeds: list[int]
    all: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    ladder: bool = False


class Variant(Checked, extra="allow"):
    """What a run's parameters are made of; other keys are passed through."""

    words: str = ""
    seeds: list[int]
    kernels: list[int] = Field([3, 1])
    widths: list[int] = Field([32, 128, 128], min_length=3, max_length=3)  # of two blocks each
    sizes: list[int] = Field([3, 0, 5], min_length=3, max_length=3)  # epochs at 16, 24, 32 pixels

    def settings(self, **own: Any) -> Settings:
        small, middle, full = self.sizes
        blocks = self.model_extra.get("blocks") or six_blocks(self.kernels, self.widths)
        schedule = {"epochs": small + middle + full, "first_sizes": [16] * small + [24] * middle}
        return Settings(**schedule | self.model_extra | own | {"blocks": blocks})


def plans() -> dict[str, Plan]:
    """The groups by name; a ProjectError if the file is invalid."""
    try:
        groups = read_yaml(project.RUNS / "study.yaml").items()
        return {name: Plan(**plan) for name, plan in groups}
    except (ParameterError, TypeError) as error:
        raise ProjectError(f"study.yaml: {error!s:.200}") from None


def planned(group: str) -> Iterator[tuple[str, int, Settings]]:
    """Every run of a group: variant, seed, parameters; a seed of all variants before the next."""
    plan = plans()[group]
    for seed in plan.seeds:
        common = {"seeds": plan.seeds, "validation": 5000, "preset": "study"} | plan.all
        for name, changes in plan.variants.items():
            variant = Variant(**common | changes)
            common = common | changes if plan.ladder else common
            if seed in variant.seeds:
                yield name, seed, variant.settings(seed=seed, run=run_name(group, name, seed))


def run_name(group: str, variant: str, seed: int) -> str:
    return f"study-{group}-{variant}-seed{seed}"


def table(group: str) -> pd.DataFrame:
    """The runs of a group that are on record, a row for each, in the order of the plan: `variant`,
    its `words`, `seed`, `accuracy` on validation images, that with another image's a
    (`accuracy_shuffled`) and with the mean a (`accuracy_mean`), `seconds` of training,
    `parameters`, `multiply_adds` per image."""
    rows = runs.read_table(project.RUNS / "study.csv", *KEY, "accuracy")
    words = {name: given.get("words", name) for name, given in plans()[group].variants.items()}
    rows = rows[(rows["group"] == group) & rows["variant"].isin(words)].drop(columns="group")
    rows.insert(1, "words", rows["variant"].map(words))
    return rows.sort_values("variant", key=lambda names: names.map([*words].index), kind="stable")


def ladder() -> pd.DataFrame:
    """From the sheet's basic network up, one change a row, in `words`: `accuracy` ± `deviation` on
    validation images, `n` seeds."""
    steps = table("ladder").groupby("words", sort=False)["accuracy"]
    return steps.agg(accuracy="mean", deviation="std", n="size").reset_index()


def run_one(group: str, variant: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one run; its row of the table."""
    images = data.load_data()
    if images.name != "cifar10":
        raise ProjectError("The study needs CIFAR-10; put it into data/.")
    network, run = training.train(images, settings)
    _, validation, _ = training.parts(images, settings)
    a, accuracies = evaluation.gates(network, validation), {}
    for what in ("shuffled", "mean"):
        changed = evaluation.with_replaced_gates(network, a, what)
        logits = evaluation.predict(changed, validation)
        accuracies[f"accuracy_{what}"] = evaluation.accuracy(logits, validation.labels)
    return {
        "group": group, "variant": variant, "seed": seed,
        "accuracy": run.metrics["validation_accuracy"], **accuracies,
        "seconds": round(run.metrics["train_seconds"], 1), "parameters": run.metrics["parameters"],
        "multiply_adds": layer_table(settings.network())["multiply_adds"].sum(),
    }  # fmt: skip


def first_steps(images: data.ImageData, rate: float) -> pd.DataFrame:
    """40 steps of the preset `small`, in batches of 100, with this rate for the gates: `loss` of
    each batch, and the `largest` |a| in it after the step. Nothing is recorded."""
    settings = Settings(gate_learning_rate=rate, batch_size=100, device="cpu", precision="float32")
    state, rows = training.TrainState(images.train, settings, torch.device("cpu")), []
    for x, labels, _ in itertools.islice(state.remaining_batches(), 40):
        losses, _ = training.train_step(
            state.network, state.optimizers, state.scaler, torch.float32,
            settings.label_smoothing, x, labels, torch.ones(len(x)),
        )  # fmt: skip
        with torch.no_grad():
            largest = max(float(a.abs().max()) for a in state.network.gates(x))
        rows.append((float(losses.mean()), largest))
    return pd.DataFrame(rows, columns=["loss", "largest"], index=range(1, len(rows) + 1))


def compare(results: pd.DataFrame) -> pd.DataFrame:
    """The difference of every variant to the first one, with simultaneous 95% intervals: a row for
    each with its `words`, `difference`, `low`, `high` (fractions), and `n` seeds.

    A seed gives all variants the same order and augmentation of images. So accuracy = variant +
    seed + residual is fitted by least squares, and Student's intervals are widened for the number
    of comparisons (Bonferroni).
    """
    base, *others = results["variant"].unique()
    fit = ols(f"accuracy ~ C(variant, Treatment({base!r})) + C(seed)", results).fit()
    found = fit.params.filter(regex="variant")
    intervals = fit.conf_int(0.05 / len(found)).loc[found.index]
    variants = found.index.str.extract(r"\[T\.(.*)\]", expand=False)
    compared = pd.DataFrame({"difference": found, "low": intervals[0], "high": intervals[1]})
    compared = compared.set_index(variants).assign(n=results["variant"].value_counts())
    compared.insert(0, "words", results.groupby("variant")["words"].first())
    return compared.loc[others]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description=__doc__)
    parser.add_argument("--cluster", help="address of a Dask cluster whose workers see this folder")
    with exit_with_message("completed rows are kept"):
        parser.add_argument("group", nargs="?", default="a", choices=plans(), help="which runs")
        options = parser.parse_args(arguments)
        path = project.RUNS / "study.csv"
        done, group = runs.read_table(path, *KEY, "seconds"), options.group
        there = set(done[KEY].itertuples(index=False, name=None))
        missing = [(group, *run) for run in planned(group) if (group, *run[:2]) not in there]
        hours = len(missing) * done.loc[done["group"] == group, "seconds"].mean() / 3600
        estimate = "" if pd.isna(hours) else f"; about {hours:.1f} hours"
        print(f"{len(missing)} runs to train{estimate}", flush=True)
        backend: dict[str, Any] = {"backend": "sequential"}
        if options.cluster:
            from distributed import Client

            try:
                Client(options.cluster)
            except (ValueError, OSError) as error:
                raise ProjectError(f"--cluster: {error!s:.150}; write tcp://host:8786.") from None
            backend = {"backend": "dask"}
        with joblib.parallel_config(**backend):
            jobs = (joblib.delayed(run_one)(*run) for run in missing)
            for row in joblib.Parallel(return_as="generator_unordered")(jobs):
                done = pd.concat([runs.read_table(path), pd.DataFrame([row])])
                write_file(path, done.to_csv(index=False))
                shutil.rmtree(project.RUNS / run_name(*(row[key] for key in KEY)))


if __name__ == "__main__":
    main()
