"""What the notebooks draw: one function, one figure, returned to the cell that calls it."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import seaborn as sns
from IPython import get_ipython
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from pandas import DataFrame, Series
from torch import Tensor

from helpers.data import IMAGE_SIZE
from helpers.evaluation import interval
from helpers.model import BlockNetwork, layer_table
from helpers.project import FIGURES, short, write_file

COLOURS = sns.color_palette("colorblind")  # the same for the same thing in every figure
TRAINING, TEST, VALIDATION, REFERENCE = COLOURS[0], COLOURS[1], COLOURS[2], (0.4, 0.4, 0.4)
DASHED = {"color": REFERENCE, "linestyle": "--"}
BLOCK, GATE, POOLING = COLOURS[9], COLOURS[4], COLOURS[7]
LAYERS = {"image": "white", "stem": COLOURS[5], "output": COLOURS[8]}
CHANNELS = {"red": COLOURS[3], "green": COLOURS[2], "blue": COLOURS[0]}
VERDICTS = {"better": COLOURS[2], "worse": COLOURS[3], "not significantly different": COLOURS[7]}
CURVES = {
    "training_accuracy_running": ("training, augmented", TRAINING, ":"),
    "training_accuracy": ("training, clean images", TRAINING, "D-"),
    "validation_accuracy": ("validation", VALIDATION, "^-"),
    "test_accuracy": ("test", TEST, "s-"),
}
WIDTH = 6.3  # inches, 16 cm; scaled to a column of 8 cm, text of 12 points is 6
Names = Sequence[str]


def use_style() -> None:
    """Set the one style of all figures; in a notebook, show them inline whatever MPLBACKEND is."""
    if getattr(shell := get_ipython(), "kernel", None) is not None:
        shell.run_line_magic("matplotlib", "inline")
    style = {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"figure.dpi": 110, "figure.labelsize": 12, "errorbar.capsize": 3, "grid.color": "0.9"}
    style |= {"legend.edgecolor": "none", "svg.hashsalt": "1"}  # one figure, always the same file
    sns.set_theme(context="notebook", style="ticks", palette=COLOURS, rc=style)


def save(figure: Figure, name: str, label: str) -> Figure:
    """Write `figures/<label>/<name>.svg`, or say why not; returns the figure."""
    path = FIGURES / label / f"{name}.svg"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
    except OSError as error:
        print(f"{short(path)} could not be saved: {error.strerror or error}.")
    return figure


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure with rows × columns axes; Jupyter shows it once, since pyplot does not know it."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False, **options)


def _axes(xlabel: str = "", ylabel: str = "", height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure with one pair of labelled axes."""
    drawn, panels = _panels(1, 1, height)
    panels[0, 0].set(xlabel=xlabel, ylabel=ylabel)
    return drawn, panels[0, 0]


def _rows(names: Names, xlabel: str) -> tuple[Figure, Axes]:
    """A figure with a row for each name, from 0 at the bottom."""
    drawn, axes = _axes(xlabel, height=1.5 + 0.34 * len(names))
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 38) for name in names], fontsize=10)
    axes.set_ylim(-0.6, len(names) - 0.4)
    return drawn, axes


def _intervals(table: DataFrame, of: str = "accuracy") -> np.ndarray:
    """How far `low` and `high` are from a column, in %, as error bars: 2×n."""
    return 100 * np.array([table[of] - table["low"], table["high"] - table[of]]).clip(0)


# ---- 01 data exploration
def images(rows: Sequence[Tensor], names: Names = (), titles: Names = ()) -> Figure:
    """Rows of images, n×3×h×w each (uint8, or floats in 0…1), named, or one title per image."""
    columns = max([1, *map(len, rows)])
    lines = max([0, *(1 + title.count("\n") for title in titles)])
    side = WIDTH / (columns + 1.5 * bool(names))  # of an image, in inches
    height = len(rows) * side + 0.2 * lines * len(titles) / columns
    drawn, axes = _panels(len(rows), columns, height)
    drawn.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for place, image in itertools.chain(*map(itertools.zip_longest, axes, rows)):
        place.set(xticks=[], yticks=[], frame_on=False)
        if image is not None:
            place.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    for place, name in zip(axes[:, 0], names):
        place.set_ylabel(name, rotation=0, ha="right", va="center")
    for place, title in zip(axes.flat, titles):
        place.set_title(title, fontsize=8.5)
    return drawn


def channel_levels(shares: Tensor, n: int) -> Figure:
    """The share of the pixels of n images at each level 0…255 in each of the channels: 3×256."""
    drawn, axes = _axes("pixel value (0–255)", "share of pixels (%)")
    table = DataFrame(100 * shares.T.numpy(), columns=list(CHANNELS))
    sns.lineplot(table, palette=CHANNELS, ax=axes)
    axes.set_ylim(0, None)
    axes.legend(title=f"channel (n = {n:,} images)")
    return drawn


def nearest_distances(distances: Tensor, limit: float) -> Figure:
    """How many test images have their nearest training image at which relative distance."""
    xlabel = "distance to the nearest training image,\nrelative to the test image's own contrast"
    drawn, axes = _axes(xlabel, f"test images (n = {len(distances):,})")
    axes.hist(distances.numpy(), bins=np.arange(0, 1.55, 0.05), color=TEST)
    axes.axvline(limit, label=f"near-duplicate threshold: {limit:g}", **DASHED)
    axes.legend(loc="upper left")
    return drawn


# ---- 02 model definition
def block_diagram() -> Figure:
    """The sheet's intermediate block: how x becomes a above, and x′ below."""
    drawn, axes = _axes()
    axes.set(xlim=(0, 13.1), ylim=(0, 7.2), frame_on=False, xticks=[], yticks=[])
    gate, branch = sns.light_palette(GATE, 5)[1], sns.light_palette(BLOCK, 5)[2]
    texts = [
        (4.5, 6.9, "$m$: c means"), (9.4, 6.9, "$a$: L weights"), (9.88, 5.8, "…"),
        (3.8, 2.35, "⋮"), (0.7, 2.1, "c×h×w"), (6.9, 4.65, "c′×h′×w′"), (12.3, 2.1, "c′×h′×w′"),
        (6.3, 0.4, "$x′ = a_1·C_1(x) + a_2·C_2(x) + … + a_L·C_L(x)$"),
        (3.1, 5.8, "channel\nmeans", "round", gate), (6.0, 5.8, "fully\nconnected", "round", gate),
        (0.55, 2.9, "$x$", "round", "w"), (12.5, 2.9, "$x′$", "round", "w"),
        (11.3, 2.9, "+", "circle", "w"),
    ]  # fmt: skip
    arrows = [((4, 5.8), (4.8, 5.8)), ((7.2, 5.8), (7.9, 5.8)), ((11.3, 2.9), (12.15, 2.9))]
    arrows += [((0.85, 2.9), (1.5, 2.9), (1.5, 5.8), (2.15, 5.8))]
    for name, x, y, end in (("1", 8.3, 4.3, 3.22), ("2", 9.15, 3.2, 3.22), ("L", 10.6, 1.5, 2.58)):
        arrows += [((1.5, 2.9), (1.5, y), (2.15, y)), ((5.4, y), (x - 0.32, y))]
        arrows += [((x, y), (11.3, y), (11.3, end)), ((x, 5.4), (x, y + 0.32))]
        texts += [(3.8, y, f"$C_{name}$ convolution", "round", branch), (x, y, "×", "circle", "w")]
        texts += [(x, 5.8, f"$a_{name}$", "square", gate)]
    for *line, end in arrows:
        style = {"color": GATE if line[0][1] == 5.4 else "black", "linewidth": 1.4}  # from a: 5.4
        axes.plot(*zip(*line), **style)
        axes.annotate("", end, line[-1], arrowprops={"arrowstyle": "-|>", "shrinkA": 0, **style})
    for x, y, text, *box in texts:
        style = {"boxstyle": box[0], "facecolor": box[1], "edgecolor": "black"} if box else None
        axes.text(x, y, text, ha="center", va="center", size=14, bbox=style)
    return drawn


def network_diagram(network: BlockNetwork) -> Figure:
    """Every layer's output as a bar, as high as the feature map and as wide as it has channels."""
    outputs = {"image": f"3×{IMAGE_SIZE}×{IMAGE_SIZE}", **layer_table(network)["output"]}
    shapes = {name: [int(n) for n in f"{text}×1".split("×")][:2] for name, text in outputs.items()}
    names = [name for name in shapes if not name.startswith("after")]
    drawn, axes = _axes("layer and number of output channels", "feature-map size (pixels)")
    scale, edge = 0.7 / max(channels for channels, _ in shapes.values()), {"edgecolor": "black"}
    for x, name in enumerate(names):
        channels, size = shapes[name]
        _, after = shapes.get(f"after {name}", shapes[name])
        wide = max(channels * scale, 0.06)
        axes.bar(x, size, wide, color=LAYERS.get(name, BLOCK), **edge)
        if after != size:
            axes.bar(x + wide / 2 + 0.06, after, 0.08, color=POOLING, label="after pooling", **edge)
        if name[0] == "B" and network.between[int(name[1:]) - 1].residual:
            arc = {"arrowstyle": "-|>", "connectionstyle": "arc3,rad=-0.5", "color": "black"}
            axes.annotate("", (x + 0.5, size + 1), (x - 0.5, size + 1), arrowprops=arc)
            axes.plot([], [], "k-", label="residual connection")
    axes.set_xticks(range(len(names)), [f"{name}\n{shapes[name][0]}" for name in names])
    axes.set_yticks(sorted({size for _, size in shapes.values() if size > 1}))
    named = dict(zip(*reversed(axes.get_legend_handles_labels())))  # each name once
    axes.legend(named.values(), named)
    return drawn


def whitening_filters(weight: Tensor) -> Figure:
    """The stem's filters, n×3×3×3, as pictures, each on its own scale with 0 in the middle."""
    n, filters = len(weight), weight.detach().float().cpu()
    scaled = 0.5 + 0.5 * filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    drawn = images(scaled.split(12 if n % 12 == 0 else 9))
    drawn.supxlabel(f"{n} filters of 3×3 pixels, each on its own scale (grey: 0)")
    return drawn


def branch_cost(table: DataFrame) -> Figure:
    """The time of a training step against `L`, relative to the first; a panel per `precision`."""
    groups = table.replace({"implementation": {"auto": "mixed if faster"}}).groupby("precision")
    drawn, panels = _panels(1, len(groups), 3.6, sharey=True)
    for axes, (precision, group) in zip(panels.flat, groups):
        kinds = {"hue": "implementation", "style": "implementation", "markers": True}
        ratio = group["milliseconds"] / group["milliseconds"].iloc[0]
        sns.lineplot(group, x="L", y=ratio, errorbar=None, ax=axes, **kinds)
        axes.set(xlabel="branches L", title=precision, xticks=table["L"].unique(), ylim=(0, None))
    panels[0, 0].set_ylabel("time of a training step\n(reference, L = 1: 1.0)")
    return drawn


def losses(values: Sequence[float]) -> Figure:
    """The training loss per batch, and its mean over 20 batches."""
    drawn, axes = _axes(f"training batch (n = {len(values):,})", "training loss (cross-entropy)")
    batch, smooth = np.arange(1, len(values) + 1), Series(values).rolling(20, min_periods=1)
    axes.plot(batch, values, color=TRAINING, alpha=0.35, linewidth=0.8)
    axes.plot(batch, smooth.mean(), color=TRAINING, linewidth=1.8, label="mean of the last 20")
    axes.set_xlim(0.5, len(values) + 0.5)
    axes.legend()
    return drawn


# ---- 03 training
def _shade_reduced(axes: Axes, sizes: Sequence[int], bounds: Sequence[float]) -> None:
    """Shade a run's first epochs, of reduced image sizes, which begin at these bounds."""
    reduced = [size for size in sizes if size < IMAGE_SIZE]
    if reduced:
        label = f"reduced resolution ({', '.join(map(str, sorted(set(reduced))))} pixels)"
        style = {"color": "0.9", "linewidth": 0, "zorder": 0, "label": label}
        axes.axvspan(bounds[0], bounds[len(reduced)], **style)


def schedules(learning_rates: Sequence[float], sizes: Sequence[int]) -> Figure:
    """Learning rate (one per step or epoch) above image size (one per epoch) over a run."""
    drawn, ((upper,), (lower,)) = _panels(2, 1, 3.6, sharex=True, height_ratios=(3, 2))
    epoch = 0.5 + (np.arange(len(learning_rates)) + 0.5) * len(sizes) / len(learning_rates)
    upper.plot(epoch, learning_rates, color=TRAINING, linewidth=2)
    upper.set(ylabel="learning rate", ylim=(0, None))
    lower.stairs(sizes, np.arange(len(sizes) + 1) + 0.5, baseline=None, color=TRAINING, linewidth=2)
    lower.set(xlabel=f"epoch (n = {len(sizes)})", ylabel="image size\n(pixels)", ymargin=0.2)
    lower.set_yticks(sorted(set(sizes)))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn


def first_steps(trials: dict[str, DataFrame]) -> Figure:
    """Loss and largest |a| of the first steps, from `study.first_steps`, a curve for each trial."""
    drawn, ((left, right),) = _panels(1, 2, 3.4, sharex=True)
    for name, table in trials.items():
        left.plot(table["loss"], label=name)
        right.plot(table["largest"], label=name)
    left.set(xlabel="training step", ylabel="training loss (cross-entropy)")
    right.set(xlabel="training step", ylabel="largest |a| in the batch", yscale="log")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn


def batch_losses(batches: DataFrame, sizes: Sequence[int]) -> Figure:
    """The loss of every training batch, from a run's `batches` and its epochs' image sizes."""
    drawn = losses(batches["loss"])
    ends = batches.groupby("epoch").size().cumsum() + 0.5
    _shade_reduced(drawn.axes[0], sizes[: len(ends)], [0.5, *ends])
    drawn.axes[0].legend()
    return drawn


def accuracy_by_epoch(history: DataFrame, published: float | None = None) -> Figure:
    """Accuracies after each epoch of a run's `history`; a published one; the tail enlarged."""
    n, test = len(history), 100 * history["test_accuracy"]
    floor = min(90, (test.iloc[-1] - 2) // 5 * 5)  # of the tail, in %
    enlarged = n >= 5 and floor >= 50
    drawn, panels = _panels(1, 1 + enlarged, 4.1)
    for axes in panels.flat:
        for column, (name, colour, line) in CURVES.items():
            style = {"color": colour, "label": name, "markersize": 5, "markevery": -(-n // 12)}
            if column in history and history[column].notna().any():
                axes.plot(history["epoch"], 100 * history[column], line, **style)
        if published is not None:
            label = f"published report, {published:.2%}"
            axes.axhline(100 * published, label=label, **DASHED)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set(xlabel="epoch", ylabel="accuracy (%)", xlim=(0.5, n + 0.5))
        _shade_reduced(axes, history["size"], np.arange(n + 1) + 0.5)
    if enlarged:
        begin = history["epoch"][test >= floor].min() - 0.5
        axes.set(xlim=(begin, n + 0.5), ylim=(floor, 100.2), title="final epochs, enlarged")
    panels[0, 0].set_title("all epochs")
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return drawn


# ---- 04 analysis
def accuracy_by_time(results: DataFrame, peers: DataFrame, published: float) -> Figure:
    """Test accuracy against reference epochs of training, of this project's presets and of others;
    a line for the published report, whose machine is not known."""
    drawn, axes = _axes("training time (reference epochs)", "test accuracy (%; bars: ± sd)", 4.2)
    kinds = ("this project", results, TEST, "bottom"), ("other projects", peers, REFERENCE, "top")
    for label, table, colour, side in kinds:
        x, y, deviation = (table[name] for name in ("reference_epochs", "accuracy", "deviation"))
        axes.errorbar(x, 100 * y, 100 * deviation, fmt="o", color=colour, label=label)
        for *point, name in zip(x, 100 * y, table["name"]):
            style = {"textcoords": "offset points", "va": side, "fontsize": 10}
            axes.annotate(name, point, (7, 0), **style)
    axes.axhline(100 * published, label="published report", **DASHED)
    axes.set(xscale="log", xmargin=0.35, ymargin=0.12)  # room for the last one's label
    axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}")
    drawn.legend(loc="outside upper center", ncols=3)
    return drawn


def seeds(seeds: DataFrame) -> Figure:
    """Test accuracy of each seed of `runs.seeds_of`, from one view and from six, with the means."""
    n, names = len(seeds), [f"seed {seed}" for seed in seeds["seed"]]
    drawn, axes = _rows(names, f"accuracy (%; n = {n}; lines: means)")
    views = {"test_accuracy": ("test", TEST, "-"), "test_accuracy_tta": ("six views", "w", ":")}
    for column, (name, inside, line) in views.items():
        values = 100 * seeds[column]
        label = f"{name}, {values.mean():.2f}" + f" ± {values.std():.2f}" * (n > 1) + "%"
        axes.plot(values, range(n), "o", color=TEST, markerfacecolor=inside, label=label)
        axes.axvline(values.mean(), color=TEST, linestyle=line, linewidth=1)
    drawn.legend(loc="outside upper center", ncols=2)
    return drawn


def ladder(table: DataFrame) -> Figure:
    """What each change adds to the `accuracy` of the row above, ± `deviation`."""
    y, rows = 100 * table["accuracy"], np.arange(len(table))[::-1]
    gains, n = y.diff().fillna(0), table["n"].min()
    drawn, axes = _rows(table["words"][::-1], f"validation accuracy (%; ± sd, n = {n})")
    lines = axes.barh(rows, gains, 0.08, left=y - gains, color=VALIDATION, linewidth=0)
    axes.errorbar(y, rows, xerr=100 * table["deviation"], fmt="o", color=VALIDATION)
    texts = [f"{y[0]:.1f}%", *(f"{gain:+.1f}".replace("-", "−") for gain in gains[1:])]
    axes.bar_label(lines, texts, padding=8, fontsize=10)
    axes.use_sticky_edges = False
    axes.margins(x=0.12)
    return drawn


def confusion(counts: np.ndarray, names: Names) -> Figure:
    """Counts of images, one row per true and one column per predicted class; mistakes coloured."""
    drawn, axes = _axes(height=5.2)
    mistakes = counts * ~np.eye(len(names), dtype=bool)
    style = {"cmap": "rocket_r", "square": True, "xticklabels": names, "yticklabels": names}
    style |= {"annot": counts, "fmt": "d", "annot_kws": {"size": 10}}
    style["cbar_kws"] = {"label": "mistakes (square-root colour scale)", "shrink": 0.75}
    sns.heatmap(
        mistakes, norm=PowerNorm(0.5, vmin=0, vmax=max(mistakes.max(), 1)), **style, ax=axes
    )
    axes.set(xlabel=f"predicted class (n = {counts.sum():,} test images)", ylabel="true class")
    axes.set_xticklabels(names, rotation=45, ha="right", rotation_mode="anchor")
    return drawn


def class_accuracies(table: DataFrame) -> Figure:
    """Accuracy of each class with its interval, from `evaluation.class_table`, the best on top."""
    own, n = table.sort_values("accuracy"), table["images"].min()
    drawn, axes = _rows(own.index, f"test accuracy (%), 95% intervals (n = {n:,} per class)")
    axes.errorbar(100 * own["accuracy"], range(len(own)), xerr=_intervals(own), fmt="o", color=TEST)
    return drawn


def reliability(table: DataFrame) -> Figure:
    """Accuracy against confidence, above the number of images in each bin of `calibration`."""
    sure, right, count = (table[name] for name in ("confidence", "accuracy", "images"))
    low, high = zip(*(interval(round(n * share), n) for n, share in zip(count, right)))
    error = _intervals(table.assign(low=low, high=high))
    drawn, ((upper,), (lower,)) = _panels(2, 1, 4.6, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], label="perfectly calibrated", **DASHED)
    label = "test, 95% intervals"
    upper.errorbar(100 * sure, 100 * right, error, fmt="o-", color=TEST, label=label)
    upper.set_ylabel("accuracy (%)")
    upper.legend()
    lower.stem(100 * sure, count, linefmt="C1-", markerfmt="C1o", basefmt=" ", bottom=0.5)
    lower.set(yscale="log", ylim=(0.5, None), ylabel="images")
    lower.set_xlabel(f"confidence (%; n = {count.sum():,} test images)")
    return drawn


def selective(table: DataFrame) -> Figure:
    """Accuracy against the share of the images that are covered, from `evaluation.selective`."""
    n, known = len(table), 100 * table[table["answered"] >= 0.01]  # the first few jump
    drawn, axes = _axes(f"coverage (%), most confident first (n = {n:,})", "accuracy (%)")
    axes.plot(known["answered"], known["accuracy"], color=TEST, linewidth=2)
    return drawn


def robustness(table: DataFrame) -> Figure:
    """Accuracy under ever stronger corruption, one panel per kind: `evaluation.robustness`."""
    kinds, n = list(table.groupby("corruption", sort=False)), table["images"].iloc[0]
    drawn, panels = _panels(-(-len(kinds) // 2), 2, 0.3 + 1.1 * len(kinds), sharey=True)
    for axes, (kind, own) in zip(panels.flat, kinds):
        strengths = ["none", *map("{:g}".format, own["strength"].iloc[1:])]
        axes.errorbar(own["step"], 100 * own["accuracy"], _intervals(own), fmt="o-", color=TEST)
        axes.set_xticks(own["step"], strengths, fontsize=10)
        axes.set_xlabel(kind)
    drawn.supylabel(f"accuracy (%), 95% intervals (n = {n:,})")
    return drawn


# ---- 05 weights
def weights(a: Sequence[Tensor], kernels: Sequence[Names]) -> Figure:
    """The distribution of a, n×L of each block, one violin per branch; dashed: 1/L."""
    drawn, axes = _axes("block and kernel of the branch", f"a (n = {len(a[0]):,} images)")
    violins, ticks = [], []
    for k, (own, names) in enumerate(zip(a, kernels), 1):
        first = len(violins)
        violins += list(own.T.numpy())
        ticks += [f"B{k} {name}" for name in names]
        axes.hlines(1 / len(names), first - 0.5, len(violins) - 0.5, **DASHED)
    sns.violinplot(violins, ax=axes, color=GATE, inner="quart", cut=0, density_norm="width")
    axes.set_xticks(range(len(ticks)), ticks, rotation=90)
    return drawn


def gates_by_class(means: Sequence[Tensor], names: Names, kernels: Sequence[Names]) -> Figure:
    """Mean a of each class, classes×L of each block, as its difference from the branch's mean."""
    panels = [a - a.mean(dim=0) for a in means]
    widths = [own.shape[1] for own in panels]
    limit = max(0.01, *(float(own.abs().max()) for own in panels))  # rounding stays white
    drawn, places = _panels(1, len(panels), 3.9, sharey=True, width_ratios=widths)
    for k, (axes, own) in enumerate(zip(places.flat, panels)):
        style = {"cmap": "vlag", "vmin": -limit, "vmax": limit, "cbar": k == len(panels) - 1}
        style["cbar_kws"] = {"label": "difference from the class average", "format": "{x:+.2f}"}
        ticks = kernels[k] if sum(widths) <= 24 else False
        sns.heatmap(own.numpy(), ax=axes, xticklabels=ticks, yticklabels=names, **style)
        axes.set_title(f"B{k + 1}")
        axes.tick_params(length=0)
    drawn.supxlabel("kernel of the branch" if sum(widths) <= 24 else "branch")
    return drawn


def study(compared: DataFrame, base: str = "the base") -> Figure:
    """The difference of every variant to the base, with its interval, from `study.compare`."""
    table = compared.sort_values("difference")
    names = map("{} (n\u00a0=\u00a0{})".format, table["words"], table["n"])
    drawn, axes = _rows(list(names), "difference in percentage points,\nsimultaneous 95% intervals")
    better, worse = table["low"] > 0, table["high"] < 0
    for which, (verdict, colour) in zip((better, worse, ~better & ~worse), VERDICTS.items()):
        own, rows = table[which], np.flatnonzero(which)
        error, style = _intervals(own, "difference"), {"color": colour, "label": verdict}
        axes.errorbar(100 * own["difference"], rows, xerr=error, fmt="o", **style)
    axes.axvline(0, linewidth=1, **DASHED)
    drawn.legend(loc="outside upper center", ncols=3, title=f"compared with {base}")
    return drawn
