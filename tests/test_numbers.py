"""Every number that the report states is that of a record, or of a source that is named here."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from helpers import data, evaluation, figures, model, report, runs, study
from helpers.data import ROOT
from helpers.evaluation import mean_and_deviation

# Percentages that no run of ours gave.
CITED = {
    "88.51": "the published answer to the same sheet",
    "95.04": "the best of the other answers to it",
    "95": "the level of an interval, and the sheet's highest mark",
    "95.0": "the same mark, and what cifar10-airbench reaches",
    "96.0": "what was aimed at, and what it reaches",
    "96": "the same",
    "90.0": "what was aimed at in ten minutes",
    "94": "what was aimed at in an hour",
    "8": "what a branch more was to add to a step at most",
}
PERCENTAGE = re.compile(r"(\d+\.\d+ ± \d+\.\d+|\d+(?:\.\d+)?) ?%")
MINUTES = re.compile(r"(\d+\.\d+(?: ± \d+\.\d+)?) minutes")
READMES = ["README.md", "notebooks/runs/README.md"]
NOTEBOOKS = [f"notebooks/{name}.ipynb" for name in report.SEQUENCE]


@functools.cache
def recorded() -> tuple[set[str], set[str]]:
    """Accuracies in per cent and minutes of all runs, and of the seeds of each, as text."""
    accuracies, minutes = set(), set()
    for run in map(runs.read, runs.names()):
        seeds = runs.seeds_of(run)
        for name in (
            "test_accuracy", "test_accuracy_tta", "validation_accuracy", "training_accuracy",
        ):  # fmt: skip
            if run.metrics[name] is not None:
                accuracies.add(f"{100 * run.metrics[name]:.2f}")
                accuracies.add(mean_and_deviation(100 * seeds[name].astype(float), 2))
        minutes.add(mean_and_deviation(seeds["train_seconds"] / 60, 1))
        minutes.add(f"{run.metrics['train_seconds'] / 60:.1f}")
    for name in ("full-seed0", report.best_run(), "longer-gpu-seed4", "longer-gpu-seed5"):
        right = round(data.TEST_IMAGES * runs.read(name).metrics["test_accuracy"])
        ends = evaluation.interval(right, data.TEST_IMAGES)
        accuracies |= {f"{100 * end:.2f}" for end in ends}
    accuracies.add(f"{100 * runs.read('restarted-seed0').history['test_accuracy'].iloc[-2]:.2f}")
    first_four = runs.seeds_of(runs.read("full-gpu-seed0")).query("seed < 4")
    accuracies.add(f"{100 * first_four['test_accuracy'].mean():.2f}")  # before there were more
    accuracies |= {f"{100 * share:.0f}" for share in gpu_convolutions().values()}
    for of_kind in runs.read_json(runs.BENCHMARKS / "last_statistics.json")["accuracy"].values():
        accuracies |= {f"{100 * accuracy:.2f}" for accuracy in of_kind.values()}
    for history in runs.RUNS.glob("choice-*/history.csv"):
        accuracies.add(f"{100 * pd.read_csv(history)['validation_accuracy'].iloc[-1]:.2f}")
    return accuracies, minutes


def gpu_convolutions() -> dict[str, float]:
    """The share of a GPU's time in a step that is convolution, by preset."""
    (gpu,) = runs.benchmark_folders("cuda")
    tables = {"quick": "profile", "full": "profile_full"}
    return {
        name: runs.benchmark(table, gpu).set_index("what")["share"]["convolutions"]
        for name, table in tables.items()
    }


def prose(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def readmes() -> str:
    """The README and that of the records, on one line."""
    return " ".join(" ".join(prose(ROOT / name) for name in READMES).split())


@pytest.mark.parametrize("name", [*READMES, *NOTEBOOKS])
def test_a_number_without_a_record_fails(name: str) -> None:
    accuracies, minutes = recorded()
    text = prose(ROOT / name)
    for stated in PERCENTAGE.findall(text):
        assert stated in accuracies | set(CITED), f"{name}: no record gives {stated} %"
    for stated in MINUTES.findall(text):
        assert stated in minutes, f"{name}: no record gives {stated} minutes"


def test_the_readme_begins_with_the_results_on_record() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[0]
    rows = re.findall(r"^\| \**`([\w-]+)`\** \|[^|]*\|(.*)\|$", text, re.M)
    assert [name for name, _ in rows] == [
        "longer-gpu", report.best_run(), "full-seed0", "full-gpu", "hour", "quick",
    ]  # fmt: skip
    for name, stated in rows:
        of_name = [run for run in runs.names() if name in (run, runs.without_seed(run))]
        seeds = runs.seeds_of(runs.read(of_name[0]))
        recorded = [
            mean_and_deviation(seeds["train_seconds"] / 60, 1),
            mean_and_deviation(100 * seeds["test_accuracy"], 2),
            mean_and_deviation(100 * seeds["test_accuracy_tta"], 2),
            str(len(seeds)),
        ]
        assert [cell.strip(" *") for cell in stated.split("|")] == recorded, name


def test_the_readme_states_the_study() -> None:
    """The differences that it names with their intervals, and that chance does not explain them."""
    results, text = study.table(), readmes()
    compared = study.compare(results)
    stated = re.findall(r"([+−]\d\.\d\d) ± (\d\.\d\d)", text)
    behind = 100 * compared["difference"]["linear"]
    assert f"linear *a* ends {-behind:.2f} points behind the softmax" in text
    wide = ["one-same-arithmetic", "one-same-parameters"]
    named = compared.loc[["constant", "uniform", "one", *wide]]
    differences, half = 100 * named["difference"], 100 * (named["high"] - named["difference"])
    assert stated == [
        (f"{points:+.2f}".replace("-", "−"), f"{around:.2f}")
        for points, around in zip(differences, half, strict=True)
    ]
    assert re.findall(r"± \d\.\d\d \| (\d+) \|", text)[-5:] == [str(n) for n in named["n"]]
    assert f"with {len(results)} short trainings" in text and f"{len(compared)} variants" in text
    assert (named["high"][:3] < 0).all() and (named["low"][3:] > 0).all(), "beyond chance"
    of_first = results[results["seed"].isin(study.SEEDS)]
    seconds = of_first.groupby("variant")["seconds"].mean()
    assert seconds[wide].tolist() == pytest.approx([seconds[study.BASE]] * 2, rel=0.1)


def plain_convolutions(instructions: str, precision: str) -> pd.Series:
    """Milliseconds of one plain convolution for each shape that was measured."""
    blocks = runs.benchmark("blocks", runs.BENCHMARKS / instructions)
    blocks = blocks[(blocks["form"] == "auto") & (blocks["precision"] == precision)]
    return blocks.set_index(["in", "out", "map", "kernels"])["plain"]


def test_what_several_branches_cost_is_that_of_the_record() -> None:
    """Blocks and steps with the compiled program: README and cells 31 and 37 of notebook 02."""
    said, readme = prose(ROOT / NOTEBOOKS[1]), readmes()
    hardware = runs.read_json(runs.latest_benchmark() / "machine.json")["hardware"]
    assert (hardware["instructions"], hardware["compiled"]) == ("AVX512", True)
    steps = runs.benchmark("steps")
    time = steps.pivot(index=["precision", "L"], columns="form", values="milliseconds")
    one = time.xs(1, level="L").min(axis=1)
    of_one = time.div(one, axis=0, level="precision")
    four, eight = (of_one.xs(L, level="L") for L in (4, 8))
    half, whole = "bfloat16", "float32"
    step = "{:.2f} times as long as one with a single branch in float32 and {:.2f} times in "
    step += "bfloat16, where the formula as written takes {:.1f} and {:.1f} times"
    ratios = [four[form][numbers] for form in ("auto", "branches") for numbers in (whole, half)]
    assert step.format(*ratios) in said
    step = "takes {:.2f} times as long as with one in float32, and {:.2f} times in bfloat16 (as "
    assert (step + "written, {:.1f} and {:.1f} times").format(*ratios) in readme
    assert "yes: {:.2f} in float32 and {:.2f} in bfloat16".format(*ratios[:2]) in readme
    saved = 1 - eight["auto"] / eight["branches"]
    assert (5 * saved).round().eq(4).all() and "four fifths of the time are saved" in said
    single = time.xs(1, level="L")
    assert (single["auto"] / single["branches"]).sub(1).abs().max() < 0.05, "as written, both"
    second, more = (of_one["auto"].xs(L, level="L") for L in (2, 4))
    hundredths = [
        [round(100 * part[numbers]) for numbers in (whole, half)]
        for part in (
            (eight["auto"] - four["auto"]) / 4,
            (more - 1) / 3,
            second - 1,
            (more - second) / 2,
        )
    ]
    assert hundredths == [[4, 4], [6, 5], [10, 4], [4, 5]]
    mean = [f"{100 * (more[numbers] - 1) / 3:.1f}" for numbers in (whole, half)]
    words = "one branch to four, one more costs {} hundredths in float32 and {} in bfloat16 in the "
    assert words.format(*mean) + "mean; from four to eight, four in either" in said
    whole_mean, half_mean = (100 * (eight["auto"][n] - 1) / 7 for n in (whole, half))
    assert round(whole_mean, 1) == round(half_mean, 1), "the mean from one to eight is as low"
    assert "each costs four to five hundredths of it" in said and "aimed at: ten hundredths" in said
    assert (
        "yes in bfloat16, four to five hundredths; in float32 in the mean of one to eight, but"
        in readme
    )
    words = "costs ten (from one to four {} in float32 and {} in bfloat16 in the mean, and from "
    assert words.format(*mean) + "four to eight four in either)" in readme
    aims = runs.benchmark_aims().reset_index("numbers").drop(index=["aimed at", "AVX512"])
    without = aims["step over quickest of L = 1"].astype(float)
    assert f"is below {without.min()} times one with a single branch" in said

    blocks = runs.benchmark("blocks").query("kernels == '3+3+3+3'")
    ends = blocks.query("map >= 8").groupby(["precision", "form"])["ratio"].agg(["min", "max"])
    words = "take {:.1f} to {:.1f} times as long as one on maps of 8×8 and more "
    words += "(as written, {:.1f} to {:.1f} times)"
    assert words.format(*ends.loc[(half, "auto")], *ends.loc[(half, "branches")]) in said
    built = blocks[blocks["form"] == "auto"]
    large, small = (built.query(f"map {which}")["ratio"] for which in (">= 16", "== 8"))
    assert f"(32 → 32 on 16×16 in bfloat16, {large.max():.2f} times)" in said
    words = f"{large.min():.1f} to {large.max():.1f} times as long as one plain convolution on "
    words += f"maps of 16×16 and more, and {small.min():.1f} to {small.max():.1f} times on 8×8"
    assert words in readme
    on = {
        (numbers, which): built.query(f"precision == '{numbers}' and map {which}")["ratio"]
        for numbers in (whole, half) for which in (">= 16", "== 8")
    }  # fmt: skip
    between = [
        " to ".join(dict.fromkeys(f"{ratio:.1f}" for ratio in (ratios.min(), ratios.max())))
        for ratios in on.values()
    ]
    words = f"{between[0]} in float32 and {between[2]} in bfloat16"
    assert f"{words}, on 8×8 {between[1]} and {between[3]}" in readme
    assert large.max() <= 1.5 and small.max() <= 2.5 and four["auto"].max() <= 1.5
    tiny = built.query("map == 4").groupby("precision")["ratio"].agg(["min", "max"])
    words = "still take {:.1f} to {:.1f} times as long as one plain convolution in float32, and "
    words += "{:.1f} to {:.1f} times in bfloat16"
    assert words.format(*tiny.loc[whole], *tiny.loc[half]) in said
    written = blocks[blocks["form"] == "branches"]["ratio"]
    ends = f"{tiny['min'].min():.1f} to {tiny['max'].max():.1f} times (as written, "
    assert f"; on 4×4, {ends}{written.min():.0f} to {written.max():.0f} times)" in readme
    for numbers, most in ((whole, 1.2), (half, 1.25)):  # a fifth more, a quarter
        swept = runs.benchmark("blocks").query("form == 'auto' and map >= 8")
        swept = swept[(swept["precision"] == numbers) & ~swept["kernels"].str.contains("1")]
        swept = swept.groupby(["in", "out", "map", "L"])["ratio"].first().unstack().dropna()
        assert (swept[8] / swept[2]).max() == pytest.approx(most, abs=0.04)


def test_where_the_program_pays_is_that_of_the_record() -> None:
    """Notebook 02, above the table."""
    (*_, folder) = runs.benchmark_folders(having="compiled")
    table, said = runs.benchmark("compiled", folder), prose(ROOT / NOTEBOOKS[1])
    half, begin = "bfloat16", model.RULES[folder.name, "float32"].compiled
    assert begin == model.RULES[folder.name, half].compiled == 7
    from_there, below = table[table["saved"] >= begin], table[table["saved"] < begin]
    taken, many = from_there["auto"] == "compiled", from_there["in"] == 384
    assert (taken == ~many | (from_there["saved"] >= 14) & (from_there["precision"] == half)).all()
    words = (
        "a block takes {min:.2f} to {max:.2f} of the time, {50%:.2f} in the median of {count:.0f}"
    )
    assert words.format(**from_there[taken]["ratio"].describe()) in said
    words = "it would take {min:.2f} to {max:.2f}, {50%:.2f} in the median of {count:.0f}"
    assert words.format(**below["ratio"].describe()) in said
    declined = from_there[~taken]["ratio"].describe()
    words = "in the ten cases left, all with 384 channels, {min:.2f} to {max:.2f}"
    assert declined["count"] == 10 and words.format(**declined) in said


def test_memory_grows_with_the_branches_as_is_said() -> None:
    """From two on by no more than the parameters do, as README and notebook 02 say."""
    table = runs.benchmark("memory").pivot(index="L", columns=["precision", "form"], values="MiB")
    learned = {
        L: sum(p.numel() for p in runs.Settings(branches=L, kernel_size=3).network().parameters())
        for L in table.index
    }
    more = round(12 * (learned[8] - learned[2]) / 2**20)
    half, whole = (table[numbers, "auto"] for numbers in ("bfloat16", "float32"))
    as_written = table.xs("branches", axis=1, level="form")
    assert (as_written.loc[8] - as_written.loc[2] > 500).all(), "a map of every branch"
    grown = [round(part[8] - part[2]) for part in (half, whole)]
    second = [round(part[1] - part[2]) for part in (half, whole)]
    assert max(grown) <= more, "no more than the parameters do"
    said = (
        "from two branches to eight {} MiB in bfloat16 and {} MiB in float32 (the parameters with "
    )
    said += "gradients and momenta are {}); with the second it falls by {} and {} MiB"
    assert said.format(*grown, more, *second) in readmes()
    said = "memory falls by {} MiB in bfloat16 and {} MiB in float32. From two branches to eight "
    said += "it grows by {} MiB in bfloat16 and {} MiB in float32, where the parameters are {} MiB "
    said += "more"
    assert said.format(*second, *grown, more) in prose(ROOT / NOTEBOOKS[1])


def test_the_pdf_says_what_was_new_in_every_training() -> None:
    """In the words of the records' README, row by row; of what that does not know, nothing."""
    new = report.what_was_new([*runs.by_cost()["run"], "mine"])
    assert all(new[:-1]) and new[-1] == "" and new[0].startswith("four blocks behind a stem")
    assert len(set(new)) == len(new), "two rows of one name have the same words"


def test_the_readmes_ratios_are_those_of_the_records() -> None:
    def seconds(run: str) -> float:
        return runs.read(run).metrics["train_seconds"]

    def longer(run: str) -> float:
        return runs.training_seconds(runs.read(run)) / seconds("hour-seed0")

    slower = plain_convolutions("AVX2", "float32") / plain_convolutions("AVX512", "bfloat16")
    nine, six = (runs.training_work(runs.read(f"choice-95-{name}")) for name in ("nine", "base"))
    small_first = seconds("choice-small-first") / seconds("choice-whole")
    stated = {
        "take two and a half to four times as long": [(2 * slower.min(), 5), (slower.max(), 4)],
        "in 1.4 times its minutes": [(10 * longer("nine-blocks-seed0"), 14)],
        "in 2.2 times the minutes of `hour`": [(10 * longer("wide-blocks-seed0"), 22)],
        "in 4.2 times the minutes of `hour`": [(10 * longer("restarted-seed0"), 42)],
        "at a third more arithmetic": [(3 * nine / six, 4)],
        "take an eighth less time": [(8 * small_first, 7)],
    }
    here = plain_convolutions("AVX512", "float32")
    assert round((plain_convolutions("AVX2", "float32") / here).median(), 1) == 1.8
    half = plain_convolutions("AVX512", "bfloat16") / here
    assert half.median() == pytest.approx(0.54, abs=0.03)
    assert runs.latest_benchmark().name == "AVX512", "here is where was measured last"
    assert "takes 1.8 times as long as on the EPYC above" in prose(ROOT / NOTEBOOKS[1])
    assert "takes little more than half the time here" in prose(ROOT / NOTEBOOKS[1])
    text = readmes()
    tried = runs.benchmark("tried").set_index("tried")["ratio"]
    stated["takes an eighth less time than as written"] = [
        (8 * (1 - 1 / tried["blocks as written"]), 1)
    ]
    full, there = (
        runs.benchmark("full", runs.BENCHMARKS / name).query("form == 'auto'")
        .set_index("size")["ratio"] for name in ("AVX512", "AMX")
    )  # fmt: skip
    assert (full.drop(16) - 1).abs().max() < 0.1, "about as long as written"
    stated["but for an eighth less on images of 16×16"] = [(8 * (1 - full[16]), 1)]
    stated["takes a tenth less time on whole images, and two fifths less on images of 16×16"] = [
        (10 * (1 - there[32]), 1), (5 * (1 - there[16]), 2),
    ]  # fmt: skip
    for words, numbers in stated.items():
        assert words in text
        assert all(round(ratio) == said for ratio, said in numbers), words


def test_the_readme_states_the_arithmetic_of_the_trainings() -> None:
    text = readmes()
    made = {name: runs.read(f"{name}-seed0") for name in ("quick", "hour", "wide-blocks", "full")}
    longer = 2 * runs.training_work(runs.read("longer-gpu-seed4"))
    flop = {name: 2 * runs.training_work(run) for name, run in made.items()}
    assert (
        f"{flop['quick'] / 1e15:.2f} PFLOP (10¹⁵ floating-point operations) for `quick`, "
        f"{flop['hour'] / 1e15:.1f} for `hour`, "
        f"{flop['wide-blocks'] / 1e15:.1f} for `wide-blocks`, "
        f"{flop['full'] / 1e15:.1f} for `full` with its first part and {longer / 1e15:.1f} for "
        "`longer`"
    ) in text
    best = runs.read(report.best_run())
    hours = runs.training_seconds(best) / 3600
    assert round(hours * longer / (2 * runs.training_work(best))) == 9 and round(hours) == 4
    assert "(by its arithmetic, nine hours where `full` took about four)" in text
    assert f"The published answer took {2 * evaluation.PUBLISHED_WORK / 1e15:.1f}." in text
    for name in ("hour", "wide-blocks", "full"):  # in TFLOP a second
        assert flop[name] / runs.training_seconds(made[name]) / 1e12 == pytest.approx(0.6, abs=0.05)
    assert "and 100 on the GPU (`quick`: 0.4 and 14)" in text
    slow = flop["hour"] / runs.training_seconds(runs.read("hour-seed1")) / 1e12
    assert f"({slow:.1f} on the slow day of `hour`'s second seed)" in text
    assert round(flop["quick"] / runs.training_seconds(made["quick"]) / 1e12, 1) == 0.4
    for name, said in (("full", 100), ("quick", 14)):
        on_gpu = runs.read(f"{name}-gpu-seed0")
        speed = 2 * runs.training_work(on_gpu) / runs.training_seconds(on_gpu) / 1e12
        assert speed == pytest.approx(said, rel=0.05)


def test_the_readme_states_what_was_measured_on_a_gpu() -> None:
    text = readmes()
    shares = gpu_convolutions()
    assert f"Convolutions are {shares['full']:.0%} of".replace("%", " %") in text
    assert f"step of `full`, and {shares['quick']:.0%} in".replace("%", " %") in text
    gpu = runs.benchmark_folders("cuda")[-1]
    memory = runs.benchmark("memory", gpu).pivot(index="L", columns="form", values="MiB")
    grown = (memory.loc[8] - memory.loc[2]).round().astype(int)
    assert f"grows by {grown['auto']} MiB as built" in text
    assert f"and by {grown['branches']} MiB as written" in text
    steps = runs.benchmark("steps", gpu)
    four, one = (steps[steps["L"] == L].set_index("form")["milliseconds"] for L in (4, 1))
    assert f"takes {four['auto']:.1f} ms as built" in text
    assert (
        f"and {four['branches']:.1f} ms as written, with one branch {one['auto']:.1f} and "
        f"{one['branches']:.1f} ms"
    ) in text
    assert "`quick` takes four seconds there and `eight-minutes` three" in text
    for name, said in (("quick", 4), ("eight-minutes", 3)):
        seconds = runs.seeds_of(runs.read(f"{name}-gpu-seed0"))["train_seconds"].mean()
        assert round(seconds) == said
    assert "pooling and copies are about a quarter, and two fifths are many small" in text
    named = ["batch normalisation", "activations", "pooling", "copies between layouts"]
    for table in ("profile", "profile_full"):
        shares = runs.benchmark(table, runs.benchmark_folders("cuda")[-1]).set_index("what")[
            "share"
        ]
        assert shares[named].sum() == pytest.approx(1 / 4, abs=0.04)
        assert shares["everything else"] == pytest.approx(2 / 5, abs=0.03)
    for name in ("full-gpu-seed0", "longer-gpu-seed4"):
        seeds = runs.seeds_of(runs.read(name))
        assert f"(n = {len(seeds)}) after {seeds['train_seconds'].mean():.0f} seconds" in text
    seeds = runs.seeds_of(runs.read("full-gpu-seed0"))
    low, high = (f"{100 * end:.2f} %" for end in seeds["test_accuracy"].agg(["min", "max"]))
    assert f"the six of `full-gpu` are such runs, and reach {low} to {high}" in text


def test_the_analysis_of_the_most_accurate_network_is_of_it() -> None:
    run = runs.read("longer-gpu-seed4")
    notebook = nbformat.read(run.folder / "04_analysis.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = "".join(out.get("text", "") for cell in cells for out in cell.outputs)
    assert f"test accuracy {run.metrics['test_accuracy']:.2%}" in text
    assert "agrees with the record: True" in text
    seconds = sum(cell.metadata.papermill.duration or 0 for cell in cells)
    assert f"those of the page on `{run.name}` {seconds:.0f} on the AMD EPYC" in readmes()


def test_the_readme_states_what_the_last_statistics_gave() -> None:
    said = runs.read_json(runs.BENCHMARKS / "last_statistics.json")
    clean, augmented = (said["accuracy"][f"{kind} images"] for kind in ("clean", "augmented"))
    assert augmented["test"] == runs.read(said["run"]).metrics["test_accuracy"]
    before, after = (runs.read(f"{name}-seed0").metrics for name in ("restarted", "full"))
    gained = 100 * (after["test_accuracy"] - before["test_accuracy"])
    text = readmes()
    for among, images in (
        ("training", "10,000 of its training images"),
        ("test", "the test images"),
    ):
        both = f"{100 * clean[among]:.2f} % | {100 * augmented[among]:.2f} %"
        assert f"| {images} | {both} |" in text
    assert (
        f"`{said['run']}` gains by them {100 * (augmented['test'] - clean['test']):.2f} points, "
        f"where `restarted` gained {gained:.2f}"
    ) in text


def test_the_training_notebook_states_what_averaging_gave() -> None:
    more = runs.read_json(runs.BENCHMARKS / "averaging.json")["points_more"]
    said = prose(ROOT / NOTEBOOKS[2])
    for decay, words in {
        "0.98": "about fifty steps is {} points ahead",
        "0.9": "one over ten {},",
        "0.995": "one over two hundred {} behind",
    }.items():
        points = f"{abs(more[decay][0]):.2f} ± {more[decay][1]:.2f}"
        assert words.format(points) in said
    assert more["0.995"][0] < 0 < more["0.9"][0]


def text_outputs(name: str) -> list[str]:
    """What the cells of a stored notebook have put out, as text."""
    cells = nbformat.read(ROOT / name, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    return [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]


def test_the_stored_training_is_the_recorded_run() -> None:
    run = runs.read("quick-seed0")
    outputs = text_outputs(NOTEBOOKS[2])
    (stored,) = [ast.literal_eval(text) for text in outputs if text.startswith("{'dataset'")]
    assert stored == run.metrics
    lines = re.findall(r"^epoch +(\d+)/.* test (\S+)%", "\n".join(outputs), re.M)
    assert [float(test) for _, test in lines] == [
        round(100 * accuracy, 2) for accuracy in run.history["test_accuracy"]
    ]


def test_the_stored_analysis_is_of_the_recorded_run() -> None:
    metrics = runs.read(report.best_run()).metrics
    said = "\n".join(text_outputs(NOTEBOOKS[3]))
    assert f"test accuracy {metrics['test_accuracy']:.2%} (" in said
    assert "agrees with the record: True" in said


# ---- the committed notebooks are what the committed code makes

# What differs from one run to the next: times, and the names that pandas gives to styled tables.
CHANGING = re.compile(
    r"\d+(?:\.\d+)? (?:s|ms|min|minutes|seconds)\b|[\d,]+(?: images)? a second"
    r"|T_[0-9a-f]{5}|0x[0-9a-f]+"
)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


# Cells whose numbers come of bfloat16 where the CPU has it, and so turn a few answers elsewhere.
ROUGH = ("precision=numbers", "by_step")


def allowed(number: str, rough: bool = False) -> float:
    """By how much a number may differ on another CPU: two thousandths of it, or one unit of its
    last decimal, which is what one image in a thousand is of a percentage; a point, if it is
    `rough`."""
    if rough:
        return 1.0
    decimals = len(number.partition(".")[2]) if "e" not in number else 0
    last = 1.001 * 10.0**-decimals if decimals else 0.0
    return max(2e-3, 2e-3 * abs(float(number)), last)


def stated(notebook: nbformat.NotebookNode) -> list[tuple[str, bool]]:
    """The readable outputs of each code cell, and whether they are rough."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        (
            "".join(text for output in cell.outputs for text in report.texts(output)),
            any(sign in cell.source for sign in ROUGH),
        )
        for cell in cells
    ]


@pytest.mark.parametrize("name", ["01_data_exploration", "04_analysis", "05_weights"])
def test_a_fresh_run_gives_the_stored_outputs(
    name: str,
    copy_project: Callable[[], Path],
    run_python: Callable[..., subprocess.CompletedProcess],
) -> None:
    """Words to the letter, numbers to the rounding by which machines may differ."""
    if data.missing_files(data.cifar10_folder()):
        pytest.skip("CIFAR-10 is not on this machine")
    project = copy_project()
    shutil.copytree(runs.RUNS, project / "notebooks" / "runs", dirs_exist_ok=True)
    source, target = project / "notebooks" / f"{name}.ipynb", project / "fresh.ipynb"
    command = ["-m", "papermill", source, target, "--no-progress-bar"]
    process = run_python(*command, project=project, cwd=source.parent)
    assert process.returncode == 0, process.stderr[-3000:]
    stored, fresh = (nbformat.read(path, as_version=4) for path in (source, target))
    for (old, rough), (new, _) in zip(stated(stored), stated(fresh), strict=True):
        old, new = CHANGING.sub("…", old), CHANGING.sub("…", new)
        assert NUMBER.sub("#", new) == NUMBER.sub("#", old)
        apart = [
            (was, is_now)
            for was, is_now in zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
            if abs(float(is_now) - float(was)) > allowed(was, rough)
        ]
        assert not apart


@pytest.mark.parametrize("run", ["quick-seed0", report.best_run()])
def test_the_kept_plots_are_those_of_the_recorded_run(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README and the PDF show. The numbers drawn are compared, as an SVG holds them."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    label = run.removesuffix("-seed0")
    report.draw_plots(runs.read(run), label)
    for name in ("03_batch_losses", "03_accuracy_by_epoch"):
        kept, fresh = (
            (root / "figures" / label / f"{name}.svg").read_text(encoding="utf-8")
            for root in (ROOT, tmp_path)
        )
        lines = [re.findall(r'<path d="(M[^"]+)" clip-path', svg) for svg in (kept, fresh)]
        assert lines[0] == lines[1] and lines[0], name


@pytest.mark.parametrize(("notebook", "module", "count"), [(1, "model", 5), (2, "training", 4)])
def test_the_stored_notebooks_show_the_code_that_is_there(
    notebook: int, module: str, count: int
) -> None:
    """02 and 03 print parts of model.py and training.py; they are those of today."""
    source = (ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8")
    cells = nbformat.read(ROOT / NOTEBOOKS[notebook], as_version=4).cells
    shown = [cell for cell in cells if "Code(" in cell.source]
    assert len(shown) == count
    for cell in shown:
        (output,) = cell.outputs
        lines = output.data["text/plain"].splitlines()
        assert lines and set(lines) <= set(source.splitlines()), cell.source
