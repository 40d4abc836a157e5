"""Does a matter? A table of runs judged on held-out images: `make study`.

    python -m helpers.study                              # the missing runs, one after the other
    python -m helpers.study --cluster tcp://host:8786    # on the workers of a Dask cluster
    python -m helpers.study --list                       # what is missing
    python -m helpers.study --only ladder                # only runs whose names begin so

There are two tables: the study, whose variants differ from one base and are trained with three
seeds each (those of its first question with eight), and the ladder, which goes from the sheet's
basic network to this report's, one change a step. Every run is notebook 03, executed by papermill
with the parameters of the preset `study` and those in which it differs. Its record is
`notebooks/runs/study-<variant>-seed<seed>` or `ladder-<number>-<step>`, with a `study.json` of what
its weights say; a run that is finished is passed over, and one that was stopped goes on. The
workers of a cluster have to see this folder, under the same path.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from scipy.stats import t as student
from torch import nn

from helpers import data, evaluation, report, runs
from helpers.model import BlockNetwork

SEEDS = (0, 1, 2)
BASE = "softmax"
# Three seeds did not tell these from the base, and they are what the study asks first: is an a that
# fits the image worth having, and are several branches? So they were given five seeds more.
FIRST_QUESTION = ("constant", "uniform", "one")
MORE_SEEDS = (3, 4, 5, 6, 7)
ACCURACIES = ("accuracy", "accuracy_shuffled", "accuracy_mean")

# What is asked, and for each answer the parameters in which it differs from the preset `study`:
# four branches with 3×3 kernels in every block, weighted by a softmax. A linear a has rates of its
# own, as in the ladder: at those of the others it ends at guessing (`linear-at-full-rate-seed*`).
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "which a": {
        "softmax": {},
        "annealed": {"temperature": 30.0},
        "sigmoid": {"gate": "sigmoid"},
        "linear": {"gate": "linear", "learning_rate": 0.007, "adam_learning_rate": 0.0014},
        "constant": {"gate": "constant"},
        "uniform": {"gate": "uniform"},
    },
    "how many branches": {
        "one": {"branches": 1},
        "two": {"branches": 2},
        "eight": {"branches": 8},
    },
    "one wide branch instead": {
        "one-same-parameters": {"branches": 1, "widths": [64, 64, 256, 256, 256, 256]},
        "one-same-arithmetic": {"branches": 1, "widths": [60, 60, 240, 240, 240, 240]},
    },
    "which kernels": {"kernels-1-3": {"kernel_size": [3, 3, 1, 1]}},
}
WORDS = {
    "softmax": "four branches under a computed softmax a",
    "annealed": "the softmax annealed from a temperature of 30",
    "sigmoid": "a sigmoid for the softmax",
    "linear": "the sheet's linear a, at a tenth of the rates",
    "constant": "a learned a that is the same for all images",
    "uniform": "a = 1/L",
    "one": "one branch",
    "two": "two branches",
    "eight": "eight branches",
    "one-same-parameters": "one branch, so wide that it has as many parameters",
    "one-same-arithmetic": "one branch, so wide that it has as many multiply-adds, with AVX2",
    "kernels-1-3": "two branches of 3×3 and two of 1×1",
}
# From the sheet's basic network to that of the preset full: a change a step. The next steps keep
# it, whether it helped at this length of training or not, but for those in `NOT_KEPT`: statistics
# can be estimated anew from one kind of images only.
LADDER: dict[str, dict[str, Any]] = {
    "basic": {
        "branches": 3, "kernel_size": 3, "strides": [1, 2, 1, 2, 1, 2], "gate": "linear",
        "stem_filters": 0, "pool_after": [], "normalise": False, "activation": "none",
        "first_sizes": [], "epochs": 2, "label_smoothing": 0.0, "translate": 0, "flip": False,
        "learning_rate": 0.007, "adam_learning_rate": 0.0014,  # a linear a takes no more
        "statistics": "running",
    },
    "batch-norm": {"normalise": True},
    "activation": {"activation": "silu"},
    "pooling": {"strides": 1, "pool_after": [1, 3, 5]},
    "softmax": {"gate": "softmax", "learning_rate": 0.07, "adam_learning_rate": 0.014},
    "stem": {"stem_filters": 24},
    "mirror-and-shift": {"flip": True, "translate": 2},
    "label-smoothing": {"label_smoothing": 0.1},
    "a-1x1-branch": {"branches": 2, "kernel_size": [3, 1]},
    "small-images-first": {"epochs": 4, "first_sizes": [16, 16, 16]},
    "longer": {"epochs": 10, "first_sizes": [16, 16, 16, 16]},
    "nine-blocks": {
        "widths": [32, 32, 32, 128, 128, 128, 128, 128, 128], "pool_after": [1, 4, 7],
        "residual": [3, 6, 9],
    },
    "stronger-augmentation": {"translate": 4, "cutout": 12, "label_smoothing": 0.2},
    "easy-images-left-out": {"skip_easy": 0.5, "epochs": 12},
    "slower": {"adam_learning_rate": 0.004, "learning_rate": 0.05},
    "trivial-augment": {"trivial_augment": 0.5},
    "clean-statistics": {"statistics": "clean images"},
    "augmented-statistics": {"statistics": "augmented images"},
    "wider": {"widths": [128, 128, 128, 384, 384, 384, 512, 512, 512]},
}  # fmt: skip
NOT_KEPT = ("clean-statistics",)


class StudyError(Exception):
    """The study cannot be run or read; the message says why and what to do."""


def variants() -> dict[str, dict[str, Any]]:
    """Every variant's parameters, in the order of the table."""
    return {name: given for group in VARIANTS.values() for name, given in group.items()}


def planned_seeds(variant: str) -> tuple[int, ...]:
    return SEEDS + MORE_SEEDS if variant in (BASE, *FIRST_QUESTION) else SEEDS


def run_name(variant: str, seed: int) -> str:
    return f"study-{variant}-seed{seed}"


def steps() -> dict[str, dict[str, Any]]:
    """The run of each step of the ladder, with all parameters that are changed in it."""
    so_far: dict[str, Any] = {}
    climbed = {}
    for number, (step, changes) in enumerate(LADDER.items()):
        climbed[f"ladder-{number:02}-{step}"] = so_far | changes
        if step not in NOT_KEPT:
            so_far = so_far | changes
    return climbed


def planned() -> dict[str, dict[str, Any]]:
    """Every run of the study and of the ladder, with the parameters in which it differs from the
    preset `study`; a seed of all variants is done before the next."""
    every = {
        run_name(variant, seed): given | {"seed": seed}
        for seed, (variant, given) in itertools.product(SEEDS + MORE_SEEDS, variants().items())
        if seed in planned_seeds(variant)
    }
    return every | steps()


def planned_parameters(name: str) -> dict[str, Any]:
    """All parameters of a planned run, checked."""
    given = runs.read_preset("study") | planned()[name] | {"run": name}
    runs.settings_from(given)
    return given


def missing(begin: str = "") -> list[str]:
    """The planned runs whose names begin so and that are not finished and measured."""
    return [
        name
        for name in planned()
        if name.startswith(begin) and not (runs.RUNS / name / "study.json").is_file()
    ]


def pace_of(like: runs.Run) -> float:
    """The seconds that a multiply-add took in a run."""
    return like.metrics["train_seconds"] / runs.training_work(like, "as evaluated")


def expected_seconds(name: str, pace: float) -> float:
    """The time of training a run, if a multiply-add takes `pace` seconds."""
    settings = runs.Settings(**planned_parameters(name))
    images = settings.images_of(data.TRAINING_IMAGES)
    return pace * runs.work_of(settings, [images] * settings.epochs, "as evaluated")


def run_one(name: str) -> str:
    """Train one run with notebook 03, measure what its weights say, and keep the record alone;
    nothing, if that is done already, perhaps by a worker beside this one.

    Returns:
        its name.
    """
    if (runs.RUNS / name / "study.json").is_file():
        return name
    images = data.load_data()
    if images.name != "cifar10":
        raise StudyError("CIFAR-10 is not here, and what learns from the stand-in says nothing.")
    if not (runs.RUNS / name / "metrics.json").is_file():
        target = report.REPORT / "study" / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        report.execute(report.TRAINING, target, planned_parameters(name))
    run = runs.read(name)
    runs.check_same_data(run, images)
    runs.write_json(run.folder / "study.json", what_weights_say(run, images))
    (run.folder / "weights.pt").unlink()
    return name


def what_weights_say(run: runs.Run, images: data.ImageData) -> dict[str, Any]:
    """What the table cannot be made of without a run's weights.

    Of the held-out images: the accuracy, and the accuracy when every image is given the weights a
    of the image before it in its batch, or each block's mean a (`evaluation.with_replaced_gates`).
    Of the blocks: the mean similarity of two branches' kernels, and the share of the images for
    which the least used branch leads.
    """
    network, settings = runs.load_network(run), runs.settings_of(run)
    _, held_out = runs.training_parts(images, settings)
    a = evaluation.gates(network, held_out)
    said: dict[str, Any] = {"accuracy": accuracy(network, held_out)}
    for what in ("shuffled", "mean"):
        said[f"accuracy_{what}"] = accuracy(
            evaluation.with_replaced_gates(network, a, what), held_out
        )
    said["entropy"] = [finite(evaluation.entropy(block).mean()) for block in a]
    said["least_used"] = [float(evaluation.leading_shares(block).min()) for block in a]
    said["kernel_similarity"] = [
        finite(evaluation.kernel_similarity(block)) for block in network.blocks
    ]
    return said


def accuracy(network: nn.Module, images: data.ImageSet) -> float:
    return evaluation.accuracy(evaluation.predict(network, images), images.labels)


def finite(value: torch.Tensor | float) -> float | None:
    """As JSON knows it: nothing for what is not defined."""
    return float(value) if math.isfinite(value) else None


# ---- what the runs say together


def row_of(name: str) -> dict[str, Any]:
    """What a run gave and cost: the accuracies of `study.json`, `seconds` of training, learned
    `parameters`, and `work`, the multiply-adds of one image forward, as written."""
    run = runs.read(name)
    said = runs.read_json(run.folder / "study.json")
    architecture = runs.settings_of(run).architecture()
    return {accuracy: said[accuracy] for accuracy in ACCURACIES} | {
        "seconds": run.metrics["train_seconds"],
        "parameters": run.metrics["parameters"],
        "work": runs.work_as_written(architecture, data.IMAGE_SIZE),
    }


def table() -> pd.DataFrame:
    """The study, a row a run: `question`, `variant`, `seed`, and what `row_of` says.

    Raises:
        RunError: a run is missing, failed or cannot be read.
    """
    rows = [
        {"question": question, "variant": variant, "seed": seed} | row_of(run_name(variant, seed))
        for question, group in VARIANTS.items()
        for variant in group
        for seed in planned_seeds(variant)
    ]
    return pd.DataFrame(rows)


def ladder() -> pd.DataFrame:
    """The ladder, a row a step that has been made: `step`, what is `new`, whether it is `kept`,
    what `row_of` says.

    Raises:
        RunError: a run failed or cannot be read.
    """
    rows, left = [], missing("ladder")
    for (step, changes), name in zip(LADDER.items(), steps(), strict=True):
        if name in left:
            continue
        new = ", ".join(f"{parameter} = {value}" for parameter, value in changes.items())
        kept = "" if step in NOT_KEPT else "kept"
        rows.append({"step": step, "new": new, "kept": kept} | row_of(name))
    columns = ["step", "new", "kept", *ACCURACIES, "seconds", "parameters", "work"]
    return pd.DataFrame(rows, columns=columns)


def compare(results: pd.DataFrame) -> pd.DataFrame:
    """The difference of every variant to `BASE` over the seeds that both have, with intervals that
    all hold the truth at once 19 times in 20 or more.

    There are two tables without gaps: the variants of the first question with all of their seeds,
    and all variants with the first seeds, which the others have. Each has a scatter of its own.

    Args:
        results: from `table`.

    Returns:
        as of `paired`, the variants in the order of the table.
    """
    names = results["variant"].drop_duplicates()
    asked = results[results["variant"].isin([BASE, *FIRST_QUESTION])]
    number = len(names) - 1
    first = paired(asked, number)
    others = paired(results[results["seed"].isin(SEEDS)], number).drop(index=first.index)
    return pd.concat([first, others]).loc[names]


def paired(results: pd.DataFrame, comparisons: int) -> pd.DataFrame:
    """The difference of every variant to `BASE`, the mean over seeds, with its interval.

    A seed gives all variants the same order and augmentation of images, so what it does to all of
    them alike is taken out: accuracy = variant + seed + rest. The rest of all variants together
    gives one standard deviation, which three seeds of one variant could not (two-way analysis of
    variance, no interaction). The intervals are Student's, each so wide that so many `comparisons`
    are all right with 95% probability (Bonferroni).

    Args:
        results: a row for every variant and seed.

    Returns:
        index the variant; `difference`, `low`, `high`, fractions of one, whether the interval
        holds zero: `undecided`, and the number `n` of seeds.

    Raises:
        StudyError: a variant lacks a seed that another has.
    """
    accuracy = results.pivot(index="variant", columns="seed", values="accuracy")
    if accuracy.isna().any(axis=None):
        raise StudyError("Variants are compared over the same seeds, and some runs are missing.")
    k, n = accuracy.shape
    rest = accuracy.sub(accuracy.mean(axis=1), axis=0)
    rest = rest - rest.mean(axis=0)
    freedom = (k - 1) * (n - 1)
    error = math.sqrt((rest**2).sum(axis=None) / freedom * 2 / n)
    half = student.ppf(1 - 0.025 / comparisons, freedom) * error
    difference = accuracy.mean(axis=1) - accuracy.loc[BASE].mean()
    around = half * (accuracy.index != BASE)
    compared = pd.DataFrame(
        {"difference": difference, "low": difference - around, "high": difference + around}
    )
    compared = compared.round(12)  # the last bits are the CPU's own, and −0.685 is a tie in print
    compared["undecided"] = (compared["low"] <= 0) & (compared["high"] >= 0)
    compared["n"] = n
    return compared.loc[results["variant"].drop_duplicates()]


def verdicts(compared: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """What `compare` says of these variants, in words and points; of `BASE` there is nothing."""
    rows = compared.loc[[name for name in names if name != BASE]]
    points = 100 * rows[["difference", "low", "high"]]
    return pd.DataFrame(
        {
            f"points more than {BASE}": [f"{d:+.2f}" for d in points["difference"]],
            "interval": [
                f"{low:+.2f} to {high:+.2f}"
                for low, high in zip(points["low"], points["high"], strict=True)
            ],
            "n": rows["n"],
            "verdict": [
                "cannot be told apart" if undecided else "better" if difference > 0 else "worse"
                for undecided, difference in zip(rows["undecided"], rows["difference"], strict=True)
            ],
        },
        index=rows.index,
    )


def summary(results: pd.DataFrame) -> str:
    """All verdicts as a list in Markdown, in `WORDS`."""
    compared = compare(results)
    every = verdicts(compared, compared.index)
    of_base = results.loc[results["variant"] == BASE, "accuracy"]
    lines = [
        f"Beside {WORDS[BASE]} ({of_base.mean():.2%} of the images held out, the mean of "
        f"{len(of_base)} seeds), in points:\n"
    ]
    for verdict in ("better", "worse", "cannot be told apart"):
        named = [
            f"{WORDS[row.Index]} ({row[1]}; {row.interval})"
            for row in every[every["verdict"] == verdict].itertuples()
        ]
        if named:
            lines.append(f"- **{verdict}:** {'; '.join(named)}")
    return "\n".join(lines)


def seed_by_seed(results: pd.DataFrame) -> pd.DataFrame:
    """The verdicts on the first question by the seeds that raised it, by those that were added, and
    by all; each from the scatter of these variants and seeds."""
    asked = results[results["variant"].isin([BASE, *FIRST_QUESTION])]
    parts = {"first seeds": SEEDS, "added seeds": MORE_SEEDS, "all of them": SEEDS + MORE_SEEDS}
    return pd.concat(
        {
            f"{said}, {len(seeds)}": verdicts(
                paired(asked[asked["seed"].isin(seeds)], len(variants()) - 1), FIRST_QUESTION
            )
            for said, seeds in parts.items()
        },
        names=["seeds"],
    )


def use_of_a(results: pd.DataFrame) -> pd.DataFrame:
    """Mean accuracies over `seeds` with the computed a, another image's, and each block's mean; a
    row a variant."""
    by_variant = results.groupby("variant", sort=False)
    means = by_variant[list(ACCURACIES)].mean()
    means.columns = ["computed", "another image's", "mean"]
    means.insert(0, "seeds", by_variant.size())
    return means


def similarities(fresh: BlockNetwork) -> pd.DataFrame:
    """The mean cosine between the kernels of two branches, a row a variant, a column a block;
    variants of one branch are left out.

    Args:
        fresh: an untrained network, for the first row.
    """
    rows = {"at the start": [evaluation.kernel_similarity(block).item() for block in fresh.blocks]}
    for variant in variants():
        names = [run_name(variant, seed) for seed in planned_seeds(variant)]
        said = [runs.read_json(runs.RUNS / name / "study.json") for name in names]
        cosines = pd.DataFrame([one["kernel_similarity"] for one in said], dtype=float)
        rows[variant] = cosines.mean().tolist()
    every = pd.DataFrame.from_dict(rows, orient="index").dropna(how="all")
    return every.set_axis([f"B{k + 1}" for k in every], axis=1)


# ---- the command


def announce(todo: list[str]) -> None:
    """Say what is to be run, and about how long that takes."""
    print(f"Of {len(planned())} runs {len(missing())} are missing.", flush=True)
    if todo:
        like = runs.read("quick-seed0")
        pace = pace_of(like)
        hours = sum(expected_seconds(name, pace) for name in todo) / 3600
        print(
            f"These {len(todo)} take about {hours:.1f} hours of training, one after the other, on "
            f"a machine like that of {like.name} ({runs.machine_of(like)}), and measuring them in "
            "float32 can take as long again or longer.",
            flush=True,
        )


def on_cluster(address: str, todo: list[str]) -> None:
    """Hand the runs to the workers of a Dask cluster, each to whichever is free.

    Raises:
        StudyError: there is no cluster at that address, or a run failed there.
    """
    from distributed import Client, as_completed  # only those who have a cluster wait for it

    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise StudyError(
            f"There is no Dask scheduler at {address} ({type(error).__name__}); start one with "
            "`dask scheduler`, or leave --cluster out."
        ) from None
    with client:
        for done in as_completed([client.submit(run_one, name, key=name) for name in todo]):
            if done.status != "finished":
                raise StudyError(f"Run {done.key} failed on the cluster: {done.exception()}")
            print(f"{done.result()} is finished", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description=__doc__)
    parser.add_argument("--only", metavar="BEGIN", default="", help="runs whose names begin so")
    parser.add_argument("--cluster", metavar="ADDRESS", help="of a Dask scheduler")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    expected = (
        StudyError, report.ReportError, data.DataError, runs.ParameterError, runs.RunError,
    )  # fmt: skip
    stopped = "Stopped from the keyboard; the same command goes on where it was."
    with runs.ending_in_a_sentence(expected, stopped):
        if not any(name.startswith(options.only) for name in planned()):
            raise StudyError(
                f"No planned run's name begins with {options.only!r}; `--list` shows them all."
            )
        todo = missing(options.only)
        announce(todo)
        if options.list:
            print("\n".join(todo))
        elif options.cluster:
            on_cluster(options.cluster, todo)
        else:
            for number, name in enumerate(todo, start=1):
                print(f"{number} of {len(todo)}: {name}", flush=True)
                run_one(name)


if __name__ == "__main__":
    main()
