"""Every figure is drawn from plain inputs, says what its axes are, and shows what it is given."""

from __future__ import annotations

from inspect import getmembers, isfunction
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import PolyCollection
from matplotlib.legend import Legend

from helpers import figures
from helpers.data import CLASSES
from helpers.evaluation import calibration, class_means, class_table, confusion, selective
from helpers.model import BlockNetwork

PREDICTED = torch.rand(200, 10), torch.arange(200) % 10
COUNTS = confusion(*PREDICTED)
IMAGES = torch.randint(256, (10, 4, 3, 32, 32), dtype=torch.uint8)
A = {L: [torch.rand(200, L).softmax(dim=1) for _ in range(2)] for L in (2, 4)}
KERNELS = {L: [["3×3", "1×1"] * (L // 2)] * 2 for L in A}
MEANS = {L: [class_means(a, PREDICTED[1]) for a in A[L]] for L in A}
BLOCKS = [dict(channels=8, kernels=[3, 1], pool=True), dict(channels=8, kernels=[3], residual=True)]
BATCHES = pd.DataFrame({"epoch": np.repeat(range(1, 7), 10), "loss": np.linspace(2, 1, 60)})
HISTORY = pd.DataFrame({"epoch": range(1, 7), "size": [16, 16, 24, 32, 32, 32]})
HISTORY["test_accuracy"] = [0.5, 0.7, 0.8, 0.9, 0.91, 0.93]
HISTORY[["training_accuracy_running", "training_accuracy", "validation_accuracy"]] = np.nan
T = pd.DataFrame({"name": ["a", "b"], "reference_epochs": [3, 9], "accuracy": 0.9, "deviation": 0})
SEEDS = pd.DataFrame({"seed": [0, 1], "test_accuracy": [0.9, 0.91], "test_accuracy_tta": 0.92})
LADDER = pd.DataFrame(
    {"words": list("abc"), "accuracy": [0.5, 0.4, 0.75], "n": 2, "deviation": 0.01}
)
CORRUPTED = pd.DataFrame({"corruption": ["blur", "noise"] * 2, "step": [0, 0, 1, 1], "images": 40})
CORRUPTED[["strength", "accuracy", "low", "high"]] = 2, 0.8, 0.7, 0.9
STUDY = pd.DataFrame({"words": list("bca"), "difference": [0, -2, 2], "low": [-1, -3, 1]})
STUDY[["high", "n"]] = [[1, 3], [-1, 3], [3, 3]]
BENCH = pd.DataFrame({"precision": ["bfloat16"], "implementation": "auto", "L": [1]})
BENCH["milliseconds"] = 9
CALLS = [
    ("images", IMAGES, CLASSES), ("images", IMAGES[:7, 0].split(5), (), ["cat\nlabel: dog"] * 7),
    ("channel_levels", torch.rand(3, 256), 9),
    ("nearest_distances", torch.rand(100), 0.4), ("whitening_filters", torch.rand(24, 3, 3, 3)),
    ("block_diagram",), ("network_diagram", BlockNetwork(BLOCKS, stem_filters=6)),
    ("first_steps", {"one": pd.DataFrame({"loss": [2, 1], "largest": 1})}),
    ("branch_cost", BENCH), ("losses", [2, 1]), ("schedules", [1, 0], [16, 32]),
    ("batch_losses", BATCHES, HISTORY["size"]), ("accuracy_by_epoch", HISTORY, 0.8851),
    ("accuracy_by_epoch", HISTORY[:1]), ("accuracy_by_time", T, T, 0.88), ("study", STUDY),
    ("accuracy_by_time", T[:0], T, 0.88), ("seeds", SEEDS), ("seeds", SEEDS[:1]),
    ("ladder", LADDER), ("confusion", COUNTS, CLASSES), ("reliability", calibration(*PREDICTED)[0]),
    ("class_accuracies", class_table(COUNTS, CLASSES)), ("selective", selective(*PREDICTED)),
    ("robustness", CORRUPTED), ("weights", A[2], KERNELS[2]), ("weights", A[4], KERNELS[4]),
    *[("gates_by_class", MEANS[L], CLASSES, KERNELS[L]) for L in A],
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_axes_are_labelled_and_the_cell_shows_the_figure(call: tuple) -> None:
    figures.use_style()
    drawn = getattr(figures, call[0])(*call[1:])
    assert not pyplot.get_fignums(), "Jupyter would show it twice"
    for axes, which in product([axes for axes in drawn.axes if axes.axison], "xy"):
        axis, common = getattr(axes, f"{which}axis"), getattr(drawn, f"get_sup{which}label")()
        ticks = [text.get_text() for text in axis.get_ticklabels() if text.get_visible()]
        assert common or axis.get_label_text() or all(t[0].isalpha() for t in ticks if t), axis
    assert all(len(legend.get_texts()) <= 6 for legend in drawn.findobj(Legend))


def test_every_figure_is_called() -> None:
    own = {name for name, f in getmembers(figures, isfunction) if f.__module__ == figures.__name__}
    assert {name for name in own if name[0] != "_"} - {"use_style", "save"} == {c[0] for c in CALLS}


def test_curves_are_those_of_the_run() -> None:
    (axes,) = figures.batch_losses(BATCHES, HISTORY["size"]).axes
    assert list(axes.lines[0].get_ydata()) == list(BATCHES["loss"])
    whole, tail = figures.accuracy_by_epoch(HISTORY, 0.8851).axes
    assert [line.get_label() for line in whole.lines] == ["test", "published report, 88.51%"]
    assert list(whole.lines[0].get_ydata()) == pytest.approx([50, 70, 80, 90, 91, 93])
    assert [patch.get_label() for patch in whole.patches] == ["reduced resolution (16, 24 pixels)"]
    assert tail.get_ylim()[0] == 90 and tail.get_xlim() == (3.5, 6.5)


@pytest.mark.parametrize("L", [2, 4])
def test_every_branch_is_drawn(L: int) -> None:
    (axes,) = figures.weights(A[L], KERNELS[L]).axes
    assert len(axes.findobj(PolyCollection)) == 2 * L
    panel, *_ = figures.gates_by_class(MEANS[L], CLASSES, KERNELS[L]).axes
    assert len(panel.get_xticklabels()) == L


def test_verdicts_gains_and_mistakes() -> None:
    (axes,) = figures.study(STUDY).axes
    assert [text.get_text()[0] for text in axes.get_yticklabels()] == ["c", "b", "a"]
    rows = {bars.get_label(): bars.lines[0].get_ydata().tolist() for bars in axes.containers}
    assert rows == {"worse": [0], "not significantly different": [1], "better": [2]}
    (axes,) = figures.ladder(LADDER).axes
    assert [text.get_text() for text in axes.texts] == ["50.0%", "−10.0", "+35.0"]
    axes, _ = figures.confusion(np.array([[9, 4], [1, 8]]), ["a", "b"]).axes
    assert axes.collections[0].get_array().tolist() == [[0, 4], [1, 0]]


def test_a_saved_figure_is_whole_and_always_the_same(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(figures, "FIGURES", tmp_path)
    written, drawn = [], figures.losses([2, 1])
    (tmp_path / "taken").touch()  # a file
    for label in ("one", "two", "taken"):
        assert figures.save(drawn, "loss", label) is drawn
        written.append({path.name: path.read_bytes() for path in (tmp_path / label).glob("*")})
    assert written[0] == written[1] and set(written[0]) == {"loss.svg"}
    assert capsys.readouterr().out.count("\n") == 1, "one line says that it is not written"
