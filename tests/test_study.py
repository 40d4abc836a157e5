"""The study runs what is missing, and its intervals are those of the books."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_rel

from helpers import data, evaluation, model, report, runs, study, training
from helpers.model import BlockNetwork

TINY = {
    "preset": "study", "validation": 40, "widths": [4, 4], "branches": 2, "kernel_size": 3,
    "stem_filters": 0, "pool_after": [1], "epochs": 1, "first_sizes": [], "batch_size": 40,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture
def tiny_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_images: data.ImageData
) -> list[str]:
    """Two variants and two seeds on tiny images; the names of the runs that are trained."""
    trained: list[str] = []
    tiny_images = dataclasses.replace(tiny_images, name="cifar10")

    def execute(name: str, target: Path, parameters: dict[str, Any]) -> None:
        assert name == "03_training"
        trained.append(parameters["run"])
        training.train(tiny_images, runs.Settings(**parameters), report=lambda line: None)

    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    monkeypatch.setattr(report, "execute", execute)
    monkeypatch.setattr(runs, "read_preset", lambda name: dict(TINY))
    monkeypatch.setattr(data, "load_data", lambda: tiny_images)
    monkeypatch.setattr(study, "announce", lambda todo: None)
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "MORE_SEEDS", ())
    variants = {"which a": {"softmax": {}, "uniform": {"gate": "uniform"}}}
    monkeypatch.setattr(study, "VARIANTS", variants)
    ladder = {"low": {"gate": "linear"}, "aside": {"flip": False}, "high": {"widths": [8, 8]}}
    monkeypatch.setattr(study, "LADDER", ladder)
    monkeypatch.setattr(study, "NOT_KEPT", ("aside",))
    return trained


def test_every_planned_run_is_of_a_network_that_can_be_made() -> None:
    assert study.BASE in study.variants()
    like = runs.read("quick-seed0")
    pace = study.pace_of(like)
    for name, given in study.planned().items():
        parameters = study.planned_parameters(name)
        assert given.items() <= parameters.items() and parameters["run"] == name
        assert parameters["validation"] >= 1000, "the test set chooses nothing"
        assert 10 < study.expected_seconds(name, pace) < 7200
    expected = runs.work_of(runs.settings_of(like), [50_000] * 6)
    assert runs.training_work(like) == pytest.approx(expected)


def test_wide_networks_of_one_branch_have_the_size_that_their_names_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The arithmetic in the forms that a CPU with AVX2 takes."""
    monkeypatch.setattr(model, "instructions", lambda: "AVX2")

    def size(variant: str) -> tuple[float, float]:
        settings = runs.Settings(**study.planned_parameters(study.run_name(variant, 0)))
        learned = sum(p.numel() for p in settings.network().parameters() if p.requires_grad)
        return learned, runs.work_of(settings, [1.0], "as evaluated")

    (parameters, work), one = size("softmax"), size("one")
    assert size("one-same-parameters")[0] == pytest.approx(parameters, rel=0.05)
    assert size("one-same-arithmetic")[1] == pytest.approx(work, rel=0.05)
    assert one[0] < 0.3 * parameters and one[1] < 0.8 * work


def test_missing_runs_are_run_and_others_passed_over(tiny_study: list[str]) -> None:
    study.run_one("study-softmax-seed1")
    assert len(study.missing()) == 6
    study.main(["--only", "study-"])
    assert sorted(tiny_study) == [
        *("study-softmax-seed0", "study-softmax-seed1"),
        *("study-uniform-seed0", "study-uniform-seed1"),
    ]
    assert study.missing() == ["ladder-00-low", "ladder-01-aside", "ladder-02-high"]
    study.main([])
    study.main([])
    assert len(tiny_study) == 7 and study.missing() == []
    results = study.table()
    assert results[["variant", "seed"]].values.tolist() == [
        *(["softmax", 0], ["softmax", 1], ["uniform", 0], ["uniform", 1]),
    ]
    for row in results.itertuples():
        run = runs.read(study.run_name(row.variant, row.seed))
        assert row.accuracy == run.metrics["validation_accuracy"]
        assert not (run.folder / "weights.pt").exists()
        if row.variant == "uniform":  # whose a is that of any other image
            assert row.accuracy == row.accuracy_shuffled == row.accuracy_mean
    used = study.use_of_a(results)
    assert used.index.tolist() == ["softmax", "uniform"]
    mean = results.loc[results["variant"] == "softmax", "accuracy_shuffled"].mean()
    assert used.loc["softmax", "another image's"] == pytest.approx(mean)
    assert used["seeds"].tolist() == [2, 2]
    fresh = runs.Settings(**study.planned_parameters("study-softmax-seed0")).network()
    alike = study.similarities(fresh)
    said = [runs.read_json(runs.RUNS / f"study-softmax-seed{s}" / "study.json") for s in (0, 1)]
    expected = np.mean([one["kernel_similarity"][1] for one in said])
    assert alike.loc["softmax", "B2"] == pytest.approx(expected)
    at_start = evaluation.kernel_similarity(fresh.blocks[1]).item()
    assert alike.loc["at the start", "B2"] == pytest.approx(at_start)


def test_nothing_is_to_learn_from_the_stand_in(
    tiny_study: list[str], tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load_data", lambda: tiny_images)
    with pytest.raises(study.StudyError, match="learns from the stand-in"):
        study.run_one("study-softmax-seed0")
    assert not tiny_study, "before anything is trained"
    with pytest.raises(SystemExit, match="No planned run's name begins with 'studie'"):
        study.main(["--only", "studie"])


def test_the_ladder_keeps_every_change_that_helped(tiny_study: list[str]) -> None:
    study.run_one("ladder-01-aside")
    assert study.ladder()["step"].tolist() == ["aside"]  # others are still to be made
    study.main(["--only", "ladder"])
    climbed = study.ladder()
    assert climbed["step"].tolist() == ["low", "aside", "high"]
    assert climbed["new"].tolist() == ["gate = linear", "flip = False", "widths = [8, 8]"]
    assert climbed["kept"].tolist() == ["kept", "", "kept"]
    assert climbed["parameters"].is_monotonic_increasing and (climbed["seconds"] > 0).all()
    settings = runs.settings_of(runs.read("ladder-02-high"))
    assert (settings.gate, settings.flip, settings.widths) == ("linear", True, [8, 8])


def test_what_another_worker_has_done_is_left_alone(tiny_study: list[str]) -> None:
    study.run_one("study-softmax-seed0")
    record = runs.RUNS / "study-softmax-seed0" / "study.json"
    before = record.read_bytes()
    assert study.run_one("study-softmax-seed0") == "study-softmax-seed0"
    assert record.read_bytes() == before and len(tiny_study) == 1


def test_a_cluster_runs_what_is_missing(
    tiny_study: list[str], capsys: pytest.CaptureFixture
) -> None:
    from distributed import LocalCluster

    study.run_one("study-softmax-seed0")
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        study.main(["--cluster", cluster.scheduler_address])
    assert study.missing() == [] and len(tiny_study) == 7
    assert capsys.readouterr().out.count("is finished") == 6


def test_a_cluster_that_is_not_there_is_named(tiny_study: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"no Dask scheduler at tcp://127\.0\.0\.1:9"):
        study.main(["--cluster", "tcp://127.0.0.1:9"])
    with pytest.raises(SystemExit, match="no Dask scheduler at nowhere"):
        study.main(["--cluster", "nowhere://"])
    assert tiny_study == []


def results_of(accuracies: np.ndarray) -> pd.DataFrame:
    """A table of variants (rows) by seeds (columns); the first variant is the base."""
    names = [study.BASE, *(f"variant {k}" for k in range(1, len(accuracies)))]
    rows = [
        {"variant": names[k], "seed": seed, "accuracy": accuracies[k, seed]}
        for k, seed in itertools.product(*map(range, accuracies.shape))
    ]
    return pd.DataFrame(rows)


def test_two_variants_are_compared_as_the_paired_t_test_does() -> None:
    accuracies = np.random.default_rng(0).normal(size=(2, 5)) + np.arange(5)
    row = study.paired(results_of(accuracies), 1).loc["variant 1"]
    book = ttest_rel(accuracies[1], accuracies[0]).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((book.low, book.high))
    assert row["difference"] == pytest.approx(np.mean(accuracies[1] - accuracies[0]))


def test_all_variants_are_compared_as_the_analysis_of_variance_does() -> None:
    """By the books' sums of squares."""
    accuracies = np.random.default_rng(2).normal(size=(4, 3)) + np.arange(3)
    rest = accuracies - accuracies.mean(1, keepdims=True) - accuracies.mean(0) + accuracies.mean()
    half = student.ppf(1 - 0.025 / 7, 6) * math.sqrt((rest**2).sum() / 6 * 2 / 3)
    compared = study.paired(results_of(accuracies), 7)
    others = compared.drop(index=study.BASE)
    assert (others["high"] - others["difference"]).tolist() == pytest.approx([half] * 3)
    assert compared.loc[study.BASE, ["difference", "low", "high"]].tolist() == [0, 0, 0]
    assert compared.index.tolist() == results_of(accuracies)["variant"].unique().tolist()


def test_a_gap_in_the_table_is_named_and_not_filled() -> None:
    results = results_of(np.zeros((3, 3))).drop(index=4)
    with pytest.raises(study.StudyError, match="some runs are missing"):
        study.paired(results, 2)


def test_the_first_question_is_judged_by_all_its_seeds_and_the_others_by_the_first() -> None:
    """Seeds 3 to 7 would move the base and widen what they have no part in."""
    accuracies = np.random.default_rng(3).normal(size=(6, 8))
    names = [study.BASE, "two", *study.FIRST_QUESTION, "eight"]
    results = results_of(accuracies)
    results["variant"] = results["variant"].map(dict(zip(results["variant"].unique(), names)))
    planned = [row.seed in study.planned_seeds(row.variant) for row in results.itertuples()]
    compared = study.compare(results[planned])
    assert compared.index.tolist() == names
    for number, name in enumerate(names):
        own = accuracies[[0, number]][:, study.planned_seeds(name)]
        assert compared.loc[name, "difference"] == pytest.approx(np.mean(own[1] - own[0]))
    half = compared["high"] - compared["difference"]
    asked = results["variant"].isin([study.BASE, *study.FIRST_QUESTION])
    alone = study.paired(results[asked], len(names) - 1)
    assert half["one"] == pytest.approx((alone["high"] - alone["difference"])["one"])
    assert half["two"] == half["eight"] != half["one"]


def test_only_the_first_question_has_more_seeds() -> None:
    assert set(study.FIRST_QUESTION) <= study.variants().keys() - {study.BASE}
    numbers = {variant: len(study.planned_seeds(variant)) for variant in study.variants()}
    assert {variant for variant, n in numbers.items() if n == 8} == {
        study.BASE, *study.FIRST_QUESTION,
    }  # fmt: skip
    assert set(numbers.values()) == {3, 8}
    assert len([name for name in study.planned() if name.startswith("study")]) == 12 * 3 + 4 * 5


def test_the_first_question_is_answered_by_added_seeds_alone_and_by_all() -> None:
    accuracies = np.random.default_rng(4).normal(size=(4, 8))
    results = results_of(accuracies)
    names = dict(zip(results["variant"].unique(), (study.BASE, *study.FIRST_QUESTION), strict=True))
    results["variant"] = results["variant"].map(names)
    other = results[results["variant"] == "one"].assign(variant="not asked", accuracy=9.0)
    said = study.seed_by_seed(pd.concat([results, other]))["points more than softmax"]
    for rows, seeds in (
        ("first seeds, 3", slice(3)),
        ("added seeds, 5", slice(3, 8)),
        ("all of them, 8", slice(8)),
    ):
        paired = 100 * (accuracies[1:] - accuracies[0])[:, seeds].mean(axis=1)
        assert [float(text) for text in said[rows]] == pytest.approx(paired.tolist(), abs=0.006)


def test_all_intervals_hold_the_truth_at_once_19_times_in_20() -> None:
    """Whatever a seed does to all variants alike; here all six variants are truly alike."""
    chance, held = np.random.default_rng(1), 0
    for _ in range(400):
        seeds, rest = 5 * chance.normal(size=(1, 3)), chance.normal(size=(6, 3))
        held += bool(study.paired(results_of(seeds + rest), 5)["undecided"].all())
    assert 0.93 < held / 400 < 0.99


def test_similarity_of_kernels_and_the_branch_that_leads() -> None:
    network = BlockNetwork([4, 4], branches=3, kernel_size=[3, 3, 1])
    first, second = network.blocks
    for block, factor in ((first, 2), (second, -1)):
        large, again, small = (branch.weight.data for branch in block.branches)
        large[:] = torch.eye(3)  # norm √3 a kernel, and 1 in the middle
        again[:], small[:] = factor * large, 1.0
        to_large, to_small = math.copysign(1, factor), 1 / math.sqrt(3)
        expected = (to_large + to_small + math.copysign(to_small, factor)) / 3
        assert float(evaluation.kernel_similarity(block)) == pytest.approx(expected)
        in_the_middle = (1 + 2 * math.copysign(1, factor)) / 3
        similarity = evaluation.kernel_similarity(block, middle=True)
        assert float(similarity) == pytest.approx(in_the_middle)
    assert evaluation.kernel_similarity(BlockNetwork([4], branches=1).blocks[0]).isnan()
    a = torch.tensor([[0.5, 0.3, 0.2], [0.1, -0.8, 0.1], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]])
    assert evaluation.leading_shares(a).tolist() == [0.5, 0.5, 0.0]
    assert evaluation.driving(a, 2)[:2].tolist() == [[3, 0], [2, 0]]


def test_verdicts_say_what_the_intervals_say(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = pd.DataFrame(
        {
            "difference": [0.0, 0.01, -0.01, 0.001],
            "low": [0.0, 0.005, -0.02, -0.002],
            "high": [0.0, 0.015, -0.001, 0.004],
            "undecided": [True, False, False, True],
            "n": [8, 8, 3, 3],
        },
        index=["softmax", "up", "down", "level"],
    )
    first = study.verdicts(compared, ["softmax", "up"])
    assert first["verdict"].to_dict() == {"up": "better"}
    second = study.verdicts(compared, ["down", "level"])
    assert second["verdict"].to_dict() == {"down": "worse", "level": "cannot be told apart"}
    assert second.loc["down"].tolist()[:3] == ["-1.00", "-2.00 to -0.10", 3]
    words = {"softmax": "the base", "up": "more", "down": "less", "level": "as much"}
    monkeypatch.setattr(study, "WORDS", words)
    monkeypatch.setattr(study, "compare", lambda _: compared.rename_axis("variant"))
    results = pd.DataFrame({"variant": ["softmax", "softmax", "up"], "accuracy": [0.79, 0.81, 1]})
    assert study.summary(results).splitlines() == [
        "Beside the base (80.00% of the images held out, the mean of 2 seeds), in points:",
        "",
        "- **better:** more (+1.00; +0.50 to +1.50)",
        "- **worse:** less (-1.00; -2.00 to -0.10)",
        "- **cannot be told apart:** as much (+0.10; -0.20 to +0.40)",
    ]


def test_every_variant_has_words() -> None:
    assert study.WORDS.keys() == study.variants().keys()
