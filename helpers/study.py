"""Does a matter? Variants of one small network, trained from several seeds: `make study`.

Each run is judged by 5,000 validation images and becomes a row of `notebooks/runs/study.csv`; what
is there is not run again. The ladder, one row a step, is in `notebooks/runs/ladder.csv`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from typing import Any

import joblib
import pandas as pd
from statsmodels.formula.api import ols

from helpers import data, evaluation, project, runs, training
from helpers.model import layer_table
from helpers.project import ProjectError, exit_with_message, write_file
from helpers.settings import Settings

BASE = "softmax"


def branches(*kernels: int, wider: int = 1) -> dict[str, Any]:
    """The blocks of the preset `small` with these branches, and so many times as wide."""
    changes = {"kernels": [*kernels]}
    rows = [block.model_dump() | changes for block in Settings().blocks]
    return {"blocks": [row | {"channels": wider * row["channels"]} for row in rows]}


COMMON = branches(3, 3, 3, 3) | {
    "preset": "study", "validation": 5000, "train_images": 20_000, "epochs": 4,
    "first_sizes": [16, 16, 16], "gate": "softmax", "gate_learning_rate": 0.014,
}  # fmt: skip
SLOWLY = {"learning_rate": 0.007, "adam_learning_rate": 0.0014, "gate_learning_rate": 0.0014}

# Variant → what it is in words, and the parameters in which it differs from COMMON.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("four 3×3 branches, softmax a", {}),
    "sigmoid": ("sigmoid a", {"gate": "sigmoid"}),
    "linear": ("linear a, at a tenth of all rates", {"gate": "linear"} | SLOWLY),
    "constant": ("learned a, the same for all images", {"gate": "constant"}),
    "uniform": ("a = 1/L", {"gate": "uniform"}),
    "one": ("one branch", branches(3)),
    "two": ("two branches", branches(3, 3)),
    "eight": ("eight branches", branches(*[3] * 8)),
    "one-same-parameters": ("one branch, as many parameters", branches(3, wider=2)),
    "kernels-1-3": ("two 3×3 and two 1×1 branches", branches(3, 3, 1, 1)),
}
WORDS = {name: words for name, (words, _) in VARIANTS.items()}
SEEDS = dict.fromkeys(("softmax", "constant", "uniform", "one"), 8)  # of the others: 3


def planned() -> Iterator[tuple[str, int, Settings]]:
    """Every run: variant, seed and parameters; a seed of all variants before the next."""
    for seed in range(max(SEEDS.values())):
        for variant, (_, changes) in VARIANTS.items():
            if seed < SEEDS.get(variant, 3):
                own = {"seed": seed, "run": f"study-{variant}-seed{seed}"}
                yield variant, seed, Settings(**COMMON | changes | own)


def table() -> pd.DataFrame:
    """The study, one row per run: `variant`, `seed`, `accuracy` on validation images, that
    with another image's a (`accuracy_shuffled`) and with the mean a (`accuracy_mean`), `seconds` of
    training, `parameters`, `multiply_adds` per image."""
    return runs.read_table(project.RUNS / "study.csv")


def ladder() -> pd.DataFrame:
    """From the sheet's basic network up, one row per step: `step` in words, whether it was `kept`,
    `accuracy` on validation images, `seconds`, `parameters`, `multiply_adds`."""
    return runs.read_table(project.RUNS / "ladder.csv")


def run_one(variant: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train one run; its row of the table. The record is deleted."""
    images = data.load_data()
    if images.name != "cifar10":
        raise ProjectError("The study needs CIFAR-10; the stand-in says nothing about a.")
    network, run = training.train(images, settings)
    _, validation, _ = training.parts(images, settings)
    a, accuracies = evaluation.gates(network, validation), {}
    for what in ("shuffled", "mean"):
        changed = evaluation.with_replaced_gates(network, a, what)
        logits = evaluation.predict(changed, validation)
        accuracies[f"accuracy_{what}"] = evaluation.accuracy(logits, validation.labels)
    shutil.rmtree(run.folder)
    return {
        "variant": variant, "seed": seed,
        "accuracy": run.metrics["validation_accuracy"], **accuracies,
        "seconds": run.metrics["train_seconds"], "parameters": run.metrics["parameters"],
        "multiply_adds": layer_table(settings.network())["multiply_adds"].sum(),
    }  # fmt: skip


def compare(results: pd.DataFrame, base: str = BASE) -> pd.DataFrame:
    """The difference of every variant to `base`, with intervals that hold together at 95 %: a row
    for each with its `words`, `difference`, `low`, `high` (fractions), and `n` seeds.

    A seed gives all variants the same order and augmentation of images. So accuracy = variant +
    seed + rest is fitted by least squares; the rest of all runs gives one standard deviation, and
    Student's intervals are widened for the number of comparisons (Bonferroni).
    """
    fit = ols(f"accuracy ~ C(variant, Treatment({base!r})) + C(seed)", results).fit()
    found = fit.params.filter(regex="variant")
    intervals = fit.conf_int(0.05 / len(found)).loc[found.index]
    variants = found.index.str.extract(r"\[T\.(.*)\]", expand=False)
    compared = pd.DataFrame({"difference": found, "low": intervals[0], "high": intervals[1]})
    compared = compared.set_index(variants).assign(n=results["variant"].value_counts())
    compared.insert(0, "words", [WORDS.get(name, name) for name in variants])
    return compared.reindex([name for name in results["variant"].unique() if name != base])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description=__doc__)
    parser.add_argument("--cluster", help="address of a Dask cluster whose workers see this folder")
    options = parser.parse_args(arguments)
    with exit_with_message("the rows that are finished are kept"):
        path = project.RUNS / "study.csv"
        done = table() if path.exists() else pd.DataFrame(columns=["variant", "seed"])
        there = set(zip(done["variant"], done["seed"], strict=True))
        missing = [run for run in planned() if run[:2] not in there]
        each = f"{done['seconds'].median() / 60:.0f}" if len(done) else "some"
        print(f"{len(missing)} runs are missing, of {each} minutes each.")
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
                done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
                write_file(path, done.to_csv(index=False))


if __name__ == "__main__":
    main()
