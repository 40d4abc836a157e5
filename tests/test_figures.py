"""Every figure of notebooks 03 to 05 is drawn from what the helpers give, with labelled axes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from helpers import data, evaluation, figures, runs

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(200, 10, generator=GENERATOR)
LABELS = torch.arange(200) % 10
COUNTS = evaluation.confusion(LOGITS, LABELS)
GATES = [torch.rand(200, L, generator=GENERATOR).softmax(dim=1) for L in (2, 4)]
BATCHES = pd.DataFrame({"epoch": [1] * 30 + [2] * 30, "loss": np.linspace(2, 1, 60)})
HISTORY = pd.DataFrame(
    {
        "epoch": [1, 2],
        "training_accuracy_running": [0.4, 0.6],
        "training_accuracy": [None, 0.7],
        "validation_accuracy": [None, None],
        "test_accuracy": [0.5, 0.65],
    }
)
COMPARED = pd.DataFrame(
    {"run": ["a", "b"], "accuracy": [0.88, 0.9], "deviation": [None, 0.01], "minutes": [8, 10],
     "minutes_deviation": [None, 2], "work": [1e12, 2e12],
     "kind": ["CPU, AVX2, float32", "NVIDIA H100 80GB HBM3, bfloat16"]}
)  # fmt: skip


def draw_all() -> dict[str, Figure]:
    images = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    means = [evaluation.class_means(a, LABELS) for a in GATES]
    worse = pd.DataFrame(
        {"corruption": ["blur"] * 2 + ["noise"] * 2, "step": [0, 1] * 2, "images": 40,
         "strength": [None, 1, None, 2], "accuracy": [0.9, 0.7, 0.9, 0.5],
         "low": [0.8, 0.6, 0.8, 0.4], "high": [0.95, 0.8, 0.95, 0.6]}
    )  # fmt: skip
    compared = pd.DataFrame(
        {"difference": [0, 0.01], "low": [0, -0.01], "high": [0, 0.03], "n": [8, 3]},
        index=["one", "other"],
    )
    return {
        "pictures": figures.pictures(images, ["cat, 90%\nlabel: dog"] * 7),
        "answered": figures.answered(evaluation.answered(LOGITS, LABELS)),
        "robustness": figures.robustness(worse),
        "occlusions": figures.occlusions(images[:2], [torch.ones(4, 4)] * 2, ["a", "b"]),
        "neighbours": figures.neighbours(images[:1], ["a"], images[None, :3], [["b"] * 3]),
        "differences": figures.differences(compared, "one"),
        "entropies_by_epoch": figures.entropies_by_epoch(
            pd.DataFrame({"epoch": [1, 2], "entropy_B1": [1, 0.5], "entropy_B2": [0.9, 0.4]})
        ),
        "batch_losses": figures.batch_losses(BATCHES),
        "accuracy_by_epoch": figures.accuracy_by_epoch(HISTORY, evaluation.PUBLISHED),
        "accuracy_by_cost": figures.accuracy_by_cost(COMPARED, (0.885, 57, 1e16)),
        "confusion": figures.confusion(COUNTS, data.CLASSES),
        "class_accuracies": figures.class_accuracies(evaluation.class_table(COUNTS, data.CLASSES)),
        "reliability": figures.reliability(evaluation.calibration(LOGITS, LABELS)),
        "gates_by_class": figures.gates_by_class(means, data.CLASSES, [["1×1"] * 2, ["3×3"] * 4]),
        "gate_entropies": figures.gate_entropies([evaluation.entropy(a) for a in GATES]),
    }


def test_figures_are_labelled_and_legends_are_short() -> None:
    figures.use_style()
    for name, drawn in draw_all().items():
        for axes in drawn.axes:
            if axes.axison and not axes.images:  # pictures have no axes
                assert any(is_named(own.xaxis) for own in together(axes, "x")), name
                assert any(is_named(own.yaxis) for own in together(axes, "y")), name
        for legend in [*drawn.legends, *(axes.get_legend() for axes in drawn.axes)]:
            assert legend is None or len(legend.get_texts()) <= 6, name


def together(axes: Axes, which: str) -> list[Axes]:
    """The axes with whom these share their x or y axis, and they themselves."""
    return getattr(axes, f"get_shared_{which}_axes")().get_siblings(axes)


def is_named(axis: Axis) -> bool:
    """Whether an axis has a label, or names at its ticks, or no ticks to be told about."""
    ticks = [tick.get_text() for tick in axis.get_ticklabels()]
    names = any(text[:1].isalpha() or "×" in text for text in ticks)
    return bool(axis.get_label_text()) or names or not any(ticks)


def test_the_plots_of_the_sheet_show_every_batch_and_every_epoch() -> None:
    loss = figures.batch_losses(BATCHES).axes[0].lines[0]
    assert loss.get_ydata().tolist() == BATCHES["loss"].tolist()
    lines = {line.get_label(): line for line in figures.accuracy_by_epoch(HISTORY).axes[0].lines}
    assert lines["test"].get_ydata().tolist() == pytest.approx([50, 65])
    assert lines["training, clean images"].get_xdata().tolist() == [2]
    assert "validation" not in lines  # there was no split


def test_epochs_of_small_images_are_shaded_with_one_label_for_each_size() -> None:
    drawn = figures.accuracy_by_epoch(HISTORY, sizes=[16, 16, 16, 24] + 26 * [32]).axes[0]
    assert [text.get_text() for text in drawn.texts] == ["16×16", "24×24"]
    assert [text.xy[0] for text in drawn.texts] == [2, 4]
    assert [text.get_rotation() for text in drawn.texts] == [90, 90], "too narrow for a word"
    assert [patch.get_x() for patch in drawn.patches] == [0.5, 3.5]
    named = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert named.count("learnt from smaller images") == 1


def test_where_a_run_went_on_from_another_is_a_line() -> None:
    drawn = figures.accuracy_by_epoch(HISTORY, sizes=[16, 32, 32], restarts=[2]).axes[0]
    said = [text.get_text().strip() for text in drawn.texts]
    assert said == ["16×16", "begun again"]
    assert drawn.texts[1].xy[0] == 1.5
    losses = figures.batch_losses(BATCHES, sizes=[16, 32], restarts=[2]).axes[0]
    assert [text.get_text().strip() for text in losses.texts] == said
    of_first = int((BATCHES["epoch"] == 1).sum())
    assert losses.texts[1].xy[0] == of_first + 0.5
    assert losses.patches[0].get_width() == of_first
    longer = figures.batch_losses(BATCHES, sizes=[16, 32, 32, 32]).axes[0]
    assert len(longer.patches) == 1, "what was not trained is not drawn"


def test_the_last_epoch_has_its_mark() -> None:
    history = pd.concat([HISTORY.iloc[[0]]] * 70).assign(epoch=range(1, 71))
    (line,) = (
        line for line in figures.accuracy_by_epoch(history).axes[0].lines
        if line.get_label() == "test"
    )  # fmt: skip
    assert {0, 69} <= set(line.get_markevery()) and len(line.get_markevery()) <= 20


def test_a_figure_is_saved_under_its_label_and_is_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.use_style()
    written = []
    for _ in range(2):
        figures.save(figures.batch_losses(BATCHES), "loss", "stand-in")
        written.append((tmp_path / "figures" / "stand-in" / "loss.svg").read_bytes())
    assert written[0] == written[1]
    assert (tmp_path / "figures" / "stand-in" / "loss.png").is_file()


def test_a_figure_that_cannot_be_saved_is_shown_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "figures").touch()
    drawn = figures.batch_losses(BATCHES)
    assert figures.save(drawn, "loss", "stand-in") is drawn
    said = capsys.readouterr().out
    assert said.startswith("figures/stand-in/loss could not be written (Not a directory)")


def test_one_name_on_several_kinds_of_machine_is_written_once_and_every_kind_is_drawn() -> None:
    kinds = [f"CPU, {number}, float32" for number in range(10)]
    rows = {
        "run": "a", "accuracy": 0.9, "deviation": None, "minutes": range(3, 13), "work": 1e12,
        "kind": kinds,
    }  # fmt: skip
    assert all(minutes > figures.ROOM_BESIDE for minutes in rows["minutes"])
    drawn = figures.accuracy_by_cost(pd.DataFrame(rows), (0.885, 57, 1e16))
    beside = drawn.axes[0].texts
    assert sorted(text.get_text() for text in beside) == [""] * 9 + ["a"]
    assert len({text.xyann for text in beside}) == 1, "all lines lead to the name"
    shown = {text.get_text() for text in drawn.legends[0].get_texts()}
    assert shown > {f"this project, {kind}" for kind in kinds}
    assert len(set(figures.MACHINES.values()) | set(figures.OTHER_MACHINES)) == 8
    assert set(runs.by_cost()["kind"]) <= set(figures.MACHINES), "those on record have their own"


def test_the_names_of_short_trainings_stand_right_beside_them() -> None:
    rows = {
        "run": ["a", "b", "c"], "accuracy": [0.9, 0.9, 0.8], "deviation": None,
        "minutes": [1, 0.9, 10], "work": 1e12, "kind": "GPU",
    }  # fmt: skip
    drawn = figures.accuracy_by_cost(pd.DataFrame(rows))
    places = {text.get_text(): text.xyann for text in drawn.axes[0].texts}
    assert places["a"][0] == pytest.approx(1.2) and places["c"][0] == 1.03
    assert abs(places["a"][1] - places["b"][1]) == pytest.approx(0.047), "one above the other"


def test_of_two_weights_that_add_up_to_one_the_first_is_drawn() -> None:
    first = torch.rand(10, 1)
    pair = torch.cat([first, 1 - first], dim=1)
    for a, columns in ((pair, 1), (2 * pair, 2), (torch.rand(10, 3), 3)):
        kinds = [[f"C{number} 3×3" for number in range(1, a.shape[1] + 1)]]
        drawn = figures.gates_by_class([a], data.CLASSES, kinds).axes[0]
        assert len(drawn.get_xticklabels()) == columns


def test_minutes_have_bars_over_seeds_and_the_arithmetic_has_none() -> None:
    left, right = figures.accuracy_by_cost(COMPARED).axes
    ends = [bar.get_segments() for bars in left.containers for bar in bars.lines[2]]
    assert any(np.array_equal(end, [[[8, 90], [12, 90]]]) for end in ends)
    assert all(len(bars.lines[2]) == 1 for bars in right.containers)


def test_nothing_published_stands_beside_what_was_trained_on_the_stand_in() -> None:
    drawn = figures.accuracy_by_cost(COMPARED)
    assert not any(line.get_marker() == "*" for axes in drawn.axes for line in axes.lines)
    assert "published answer, a GPU" not in [t.get_text() for t in drawn.legends[0].get_texts()]
    figures.accuracy_by_cost(COMPARED.iloc[:0])  # what smoke leaves on record: nothing to compare


def test_the_confusion_figure_has_true_classes_as_rows() -> None:
    counts = np.array([[5, 1, 2], [3, 6, 4], [7, 8, 9]])
    (axes,) = figures.confusion(counts, ["a", "b", "c"]).axes
    written = [text.get_text() for text in axes.texts]
    assert written == ["", "1", "2", "3", "", "4", "7", "8", "", "5", "6", "9"]
    assert axes.get_ylabel() == "true class" and axes.get_xlabel().startswith("answer")


def test_the_reliability_figure_has_accuracy_over_confidence() -> None:
    measured = evaluation.calibration(LOGITS, LABELS)
    upper, lower = figures.reliability(measured).axes
    (_, points, *_), counts = upper.lines, lower.lines[0]
    assert points.get_xdata().tolist() == (100 * measured.confidence).tolist()
    assert points.get_ydata().tolist() == (100 * measured.accuracy).tolist()
    assert counts.get_ydata().tolist() == measured.count.tolist()


def test_where_covering_costs_most_is_red() -> None:
    loss = torch.tensor([[0.5, -0.1], [0.0, 0.2]])
    panels = figures.occlusions(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [loss], ["a"]).axes
    (shown,) = panels[1].images
    red, _, blue, _ = shown.cmap(shown.norm(0.5))
    assert red > blue and shown.get_array().tolist() == loss.tolist()
    assert (shown.norm.vmin, shown.norm.vmax) == (-0.5, 0.5)


def test_as_written_is_dashed_and_as_built_is_not() -> None:
    blocks = pd.DataFrame(
        [(24, 32, 32, "3", form, L, time * L) for form, time in TIMES for L in (1, 2)],
        columns=["in", "out", "map", "kernels", "form", "L", "ratio"],
    )
    steps = pd.DataFrame(
        [("float32", form, L, time * L) for form, time in TIMES for L in (1, 2)],
        columns=["precision", "form", "L", "milliseconds"],
    )
    for axes in figures.cost_by_branches(blocks, steps).axes:
        by_style = {line.get_linestyle(): line.get_ydata().tolist() for line in axes.lines}
        assert by_style["--"][1] > by_style["-"][1]


TIMES = (("branches", 2.0), ("auto", 1.0))
