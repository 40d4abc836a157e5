"""The study's arithmetic, by hand, and its table of runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_rel

from helpers import project, study
from helpers.settings import Settings


def results(**accuracies: list[float]) -> pd.DataFrame:
    rows = [
        {"variant": variant, "words": variant.upper(), "seed": seed, "accuracy": accuracy}
        for variant, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_two_variants_are_compared_by_the_paired_t_test() -> None:
    base, other = [0.80, 0.83, 0.81, 0.84], [0.82, 0.84, 0.84, 0.85]
    row = study.compare(results(softmax=base, one=other)).loc["one"]
    expected = ttest_rel(other, base).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(np.mean(other) - np.mean(base))
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))


def test_several_comparisons_widen_the_intervals_and_seeds_may_be_missing() -> None:
    values = {"softmax": [0.80, 0.82, 0.81], "one": [0.79, 0.80, 0.81], "two": [0.84, 0.85]}
    compared = study.compare(results(**values))
    assert compared["n"].tolist() == [3, 2]
    # Whole tables: a two-way analysis of variance.
    shifts = {"softmax": [0, 0, 0], "one": [0.01, 0, 0.02], "two": [0.03, 0.03, 0.02]}
    whole = {name: np.array([0.80, 0.82, 0.81]) + shift for name, shift in shifts.items()}
    compared = study.compare(results(**whole))
    table = np.array(list(whole.values()))
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    error = np.sqrt((rest**2).sum() / 4 * 2 / 3)
    half = t.ppf(1 - 0.025 / 2, 4) * error
    assert (compared["high"] - compared["difference"]).tolist() == pytest.approx([half] * 2)


@pytest.mark.parametrize("group", study.plans())
def test_a_plan_gives_runs_that_differ_and_every_row_was_planned(group: str) -> None:
    runs = [*study.planned(group)]
    settings = {one.model_dump_json(exclude={"run", "seed"}) for _, _, one in runs}
    assert len(settings) == len({variant for variant, _, _ in runs})
    table = study.table(group)
    assert set(zip(table["variant"], table["seed"], strict=True)) <= {run[:2] for run in runs}


def test_what_is_missing_is_trained_and_each_row_is_kept_at_once(
    records: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    groups = {"g": {"seeds": [1, 2], "all": {}, "variants": {"one": {"words": "a"}}}}
    (records / "study.yaml").write_text(json.dumps(groups), encoding="utf-8")
    header = "group,variant,seed,accuracy,seconds\n"
    (records / "study.csv").write_text(header + "g,one,1,0.5,3600\n", encoding="utf-8")

    def run_one(group: str, variant: str, seed: int, settings: Settings) -> dict[str, object]:
        (project.RUNS / settings.run).mkdir()
        return {"group": group, "variant": variant, "seed": seed, "accuracy": 0.6, "seconds": 9}

    monkeypatch.setattr(study, "run_one", run_one)
    study.main(["g"])
    assert "1 runs to train; about 1.0 hours" in capsys.readouterr().out
    assert study.table("g")["accuracy"].tolist() == [0.5, 0.6]
    assert {path.name for path in records.iterdir()} == {"study.yaml", "study.csv"}
