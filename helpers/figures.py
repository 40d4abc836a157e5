"""What the notebooks draw: one function, one figure, returned to the cell that calls it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch, Polygon
from matplotlib.ticker import NullFormatter
from scipy.optimize import isotonic_regression
from torch import Tensor

from helpers.data import IMAGE_SIZE, ROOT
from helpers.evaluation import Calibration, interval
from helpers.model import BlockNetwork, layer_table
from helpers.runs import write_aside

COLOURS = sns.color_palette("colorblind")
# The same colour for the same thing in every figure.
TRAINING, TEST, VALIDATION, REFERENCE = COLOURS[0], COLOURS[1], COLOURS[2], (0.45, 0.45, 0.45)
WIDTH = 6.4  # inches


def use_style() -> None:
    """Set the one style of all figures: large enough to read when printed 8 cm wide."""
    sns.set_theme(context="notebook", style="ticks", palette=COLOURS)
    matplotlib.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "svg.hashsalt": "input-weighted convolution",  # the same figure gives the same file
        }
    )


def save(figure: Figure, name: str, label: str) -> Figure:
    """Write `figures/<label>/<name>.svg` and `.png`, and give the figure back to be shown.

    Where they cannot be written, that is said, and the figure is shown all the same.
    """
    folder = ROOT / "figures" / label
    kinds = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 150}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, options in kinds.items():
            draw = partial(figure.savefig, format=kind, **options)
            write_aside(folder / f"{name}.{kind}", draw)
    except OSError as error:
        print(f"figures/{label}/{name} could not be written ({error.strerror}); it is only shown.")
    return figure


def figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates a function that draws: closes its figure, so that Jupyter shows it once."""

    @wraps(draw)
    def closed(*arguments: object, **options: object) -> Figure:
        drawn = draw(*arguments, **options)
        plt.close(drawn)
        return drawn

    return closed


# ---- 01 data exploration

# The channels in their own colours, as far as colour-blind readers tell them apart.
CHANNELS = {"red": COLOURS[3], "green": COLOURS[2], "blue": COLOURS[0]}


def _picture(axes: Axes, image: Tensor) -> None:
    """Show a uint8 image 3×h×w with nothing around it."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


@figure
def class_balance(training: Tensor, test: Tensor, names: Sequence[str]) -> Figure:
    """Images of each class in the training and the test set, from their labels."""
    counts = {"training": training.bincount(minlength=10), "test": test.bincount(minlength=10)}
    table = pd.DataFrame({part: count.numpy() for part, count in counts.items()}, index=list(names))
    drawn, axes = plt.subplots()
    table.plot.barh(ax=axes, color=[TRAINING, TEST], width=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="images", ylabel="class")
    axes.legend([f"{part}, n = {table[part].sum():,}" for part in table], loc="lower right",
                bbox_to_anchor=(1, 1), ncols=2)  # fmt: skip
    return drawn


@figure
def examples(images: Tensor, names: Sequence[str]) -> Figure:
    """A row of images for each class: uint8 classes×n×3×32×32."""
    rows, columns = images.shape[:2]
    size = WIDTH / (columns + 1.5)
    drawn, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * size), squeeze=False)
    drawn.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.02, hspace=0.02)
    for row, some, name in zip(axes, images, names):
        for place, image in zip(row, some):
            _picture(place, image)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return drawn


@figure
def pictures(images: Tensor, titles: Sequence[str]) -> Figure:
    """Images, uint8 n×3×32×32, five in a row from top to bottom, each with its title."""
    columns = 5
    rows = -(-len(images) // columns)
    lines = [title.split("\n") for title in titles]
    height = WIDTH / columns + 0.2 * max(map(len, lines))
    longest = max(len(line) for title in lines for line in title)
    drawn, axes = plt.subplots(rows, columns, figsize=(WIDTH, rows * height), squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, image, title in zip(axes.flat, images, titles):
        _picture(place, image)
        place.set_title(title, fontsize=11 if columns * longest < 60 else 9)
    return drawn


@figure
def channel_levels(shares: Tensor, images: int) -> Figure:
    """The share of pixels at each level 0…255 in each of the channels: 3×256."""
    drawn, axes = plt.subplots()
    for (name, colour), share, line in zip(CHANNELS.items(), shares, ("-", "--", ":")):
        axes.plot(100 * share.numpy(), color=colour, linestyle=line, label=name)
    axes.set(xlabel="level of a pixel, 0 to 255", ylabel="share of pixels in %", ylim=(0, None))
    axes.legend(title=f"channel, n = {images:,} images")
    return drawn


@figure
def nearest_distances(distances: Tensor, limit: float) -> Figure:
    """How many test images have their nearest training image at which relative distance."""
    drawn, axes = plt.subplots()
    axes.hist(distances.numpy(), bins=np.arange(0, 1.55, 0.05), color=TEST)
    axes.axvline(limit, color=REFERENCE, linestyle="--", label=f"limit {limit:g}")
    axes.set(
        xlabel="distance to the nearest training image,\nin the test image's own contrast",
        ylabel=f"test images (n = {len(distances):,})",
        xlim=(0, 1.5),
    )
    axes.legend(loc="upper left")
    return drawn


@figure
def pairs(first: Tensor, second: Tensor, titles: Sequence[str]) -> Figure:
    """Images of the test set above their nearest training images, uint8 n×3×32×32 each."""
    lines = 1 + max(title.count("\n") for title in titles)
    height = 2 * (WIDTH - 0.4) / len(first) + 0.2 * lines
    drawn, axes = plt.subplots(2, len(first), figsize=(WIDTH, height), squeeze=False)
    for row, images, name in zip(axes, (first, second), ("test", "training")):
        for place, image in zip(row, images):
            _picture(place, image)
        row[0].set_ylabel(name)
    for place, title in zip(axes[0], titles):
        place.set_title(title, fontsize=10)
    return drawn


# ---- 02 model definition

BLOCK, GATE, STEM, OUTPUT, BETWEEN = COLOURS[9], COLOURS[4], COLOURS[2], COLOURS[1], COLOURS[7]
AROUND = COLOURS[3]  # the way around a block
DIAGRAM_TEXT = 14  # points in a figure 16 cm wide, so that 7 are left in a column of 8 cm
LAYER_WIDTH, LAYERS_LEFT = 1.5, 2.2  # of the diagram of the network, in half inches
AXIS, DEPTH = 3.4, 7  # height of the slabs' middle, and a slab's height over its depth
LAYER_COLOURS = {"image": (1.0, 1.0, 1.0), "stem": STEM, "output": OUTPUT}  # and BLOCK

Point = tuple[float, float]


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing of `width` × `height` half inches, with coordinates in half inches."""
    drawn, axes = plt.subplots(figsize=(width / 2, height / 2))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return drawn, axes


def _write(axes: Axes, at: Point, text: str, **options: Any) -> None:
    axes.text(*at, text, **{"ha": "center", "va": "center", "size": DIAGRAM_TEXT, **options})


def _box(axes: Axes, centre: Point, size: Point, text: str, colour: Any) -> None:
    corner = (centre[0] - size[0] / 2, centre[1] - size[1] / 2)
    rounded = "round,pad=0,rounding_size=0.15"
    axes.add_patch(FancyBboxPatch(corner, *size, rounded, facecolor=colour, edgecolor="black"))
    _write(axes, centre, text, linespacing=1.05)


def _operator(axes: Axes, centre: Point, sign: str) -> None:
    axes.add_patch(Circle(centre, 0.3, facecolor="white", edgecolor="black", zorder=3))
    _write(axes, centre, sign, zorder=4, va="center_baseline")


def _arrow(axes: Axes, *points: Point, zorder: float = 2, **options: Any) -> None:
    """A line through the points with a head at the last."""
    style = {"color": "black", "linewidth": 1.4, **options}
    axes.plot(*zip(*points[:-1]), zorder=zorder, **style)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14, **style}
    axes.annotate("", points[-1], points[-2], arrowprops=head, zorder=zorder)


@figure
def block_diagram() -> Figure:
    """The sheet's intermediate block: how x becomes a above, and x′ below."""
    drawn, axes = _canvas(13, 7.5)
    x, total, x_new = (0.65, 3.05), (11.0, 3.05), (12.25, 3.05)
    gate_colour, branch_colour = sns.light_palette(GATE, 5)[1], sns.light_palette(BLOCK, 5)[2]

    _box(axes, x, (0.8, 0.9), "$x$", "white")
    _write(axes, (0.65, 2.25), "c×h×w")
    _arrow(axes, (1.05, 3.05), (1.6, 3.05), (1.6, 6.1), (2.1, 6.1))
    _box(axes, (3.2, 6.1), (2.2, 1.2), "channel\nmeans", gate_colour)
    _arrow(axes, (4.3, 6.1), (5.05, 6.1))
    _write(axes, (4.67, 7.1), "$m$: c numbers")
    _box(axes, (6.2, 6.1), (2.3, 1.2), "fully\nconnected", gate_colour)
    _arrow(axes, (7.35, 6.1), (7.85, 6.1))
    _box(axes, (9.25, 6.1), (2.8, 0.9), "", gate_colour)
    _write(axes, (9.25, 7.1), "$a$: L numbers")
    _write(axes, (9.62, 6.1), "…")

    for name, y, column in (("1", 4.6, 8.3), ("2", 3.4, 9.05), ("L", 1.5, 10.2)):
        _arrow(axes, (1.6, 3.05), (1.6, y), (2.1, y))
        _box(axes, (3.85, y), (3.5, 0.9), f"$C_{name}$ convolution", branch_colour)
        _arrow(axes, (5.6, y), (column - 0.3, y))
        _arrow(axes, (column, 5.65), (column, y + 0.3), color=GATE, linestyle="--")
        _operator(axes, (column, y), "×")
        _write(axes, (column, 6.08), f"$a_{name}$")
        _arrow(
            axes, (column + 0.3, y), (total[0], y), (total[0], total[1] + np.sign(y - 3.3) * 0.3)
        )
    _write(axes, (3.85, 2.5), "⋮")
    _write(axes, (6.8, 4.95), "c′×h′×w′")
    _operator(axes, total, "+")
    _arrow(axes, (11.3, 3.05), (11.85, 3.05))
    _box(axes, x_new, (0.8, 0.9), "$x′$", "white")
    _write(axes, (12.15, 2.25), "c′×h′×w′")
    formula = "$x′ = a_1·C_1(x) + a_2·C_2(x) + … + a_L·C_L(x)$"
    _write(axes, (6.5, 0.4), formula, size=DIAGRAM_TEXT + 2)
    return drawn


@figure
def network_diagram(network: BlockNetwork) -> Figure:
    """Every layer's output as a slab: height for the map's size, thickness for the channels.

    What stands between two blocks is the thin slab at the first one's right; an arrow around both
    is the way of a block's input that is added there.
    """
    outputs = layer_table(network)["output"]
    shapes = {name: [int(n) for n in text.split("×")] for name, text in outputs.items()}
    layers = {"image": [3, IMAGE_SIZE, IMAGE_SIZE], **shapes}
    names = [name for name in layers if not name.startswith("after")]
    drawn, axes = _canvas(LAYERS_LEFT + LAYER_WIDTH * len(names), 6.5)
    scale = 0.6 / max(shape[0] for shape in layers.values()), 2.5 / IMAGE_SIZE
    ends = (LAYERS_LEFT + 0.2, AXIS), (LAYERS_LEFT + LAYER_WIDTH * len(names) - 0.1, AXIS)
    _arrow(axes, *ends, color="darkgray", zorder=0)
    for number, name in enumerate(names):
        middle = LAYERS_LEFT + LAYER_WIDTH * (number + 0.5)
        _layer(axes, middle, name, layers[name], layers.get(f"after {name}"), scale)
    for k, between in enumerate(network.between, start=1):
        if between.residual:
            middle = LAYERS_LEFT + LAYER_WIDTH * (names.index(f"B{k}") + 0.5)
            _around(axes, middle, layers[f"B{k}"][1] * scale[1])
    pooled = "after pooling" if any(name.startswith("after") for name in layers) else ""
    for y, text in zip((1.55, 0.95, 0.35), ("channels", "map", pooled)):
        _write(axes, (0.1, y), text, ha="left", color="dimgray")
    kinds = {"block": BLOCK, "what follows it": BETWEEN} if pooled else {"block": BLOCK}
    keys: list[Artist] = [
        Patch(facecolor=colour, edgecolor="black", label=kind) for kind, colour in kinds.items()
    ]
    if any(between.residual for between in network.between):
        keys.append(Line2D([], [], color=AROUND, label="block's input, added"))
    axes.legend(handles=keys, loc="upper center", ncols=3, fontsize=DIAGRAM_TEXT, handlelength=1)
    return drawn


def _around(axes: Axes, middle: float, height: float) -> None:
    """The way of a block's input around it and what follows it, whose slabs are so high."""
    left, right = middle - 0.47 * LAYER_WIDTH, middle + 0.47 * LAYER_WIDTH
    above = AXIS + height * (1 + 1 / DEPTH) / 2 + 0.3
    _arrow(axes, (left, AXIS), (left, above), (right, above), (right, AXIS), color=AROUND)


def _layer(
    axes: Axes, middle: float, name: str, shape: list[int], after: list[int] | None, scale: Point
) -> None:
    """A layer's slab with its captions, and the slab of what follows it."""
    channels, *size = shape
    sizes = "×".join(map(str, size)) or "logits"
    for y, text in ((5.3, name), (1.55, str(channels)), (0.95, sizes)):
        _write(axes, (middle, y), text)
    slab = max(channels * scale[0], 0.06), size[0] * scale[1] if size else 1.0
    behind = (0.08, after[1] * scale[1]) if after else (0.0, 0.0)
    width = slab[0] + slab[1] / DEPTH + (0.13 + behind[1] / DEPTH if after else 0.0)
    left = middle - width / 2
    _slab(axes, left, slab, LAYER_COLOURS.get(name, BLOCK))
    if after:
        _slab(axes, left + slab[0] + slab[1] / DEPTH + 0.05, behind, BETWEEN)
        if after[1:] != size:
            _write(axes, (middle, 0.35), f"{after[1]}×{after[2]}")


def _slab(axes: Axes, left: float, size: Point, colour: Any) -> None:
    """A slab of thickness × height in oblique projection, its middle on the diagram's axis."""
    depth = size[1] / DEPTH
    right, low, high = left + size[0], AXIS - (size[1] + depth) / 2, AXIS + (size[1] - depth) / 2
    back, top = right + depth, high + depth
    front = [(left, low), (right, low), (right, high), (left, high)]
    roof = [(left, high), (right, high), (back, top), (left + depth, top)]
    side = [(right, low), (back, low + depth), (back, top), (right, high)]
    for shade, face in ((1.0, front), (0.85, roof), (0.7, side)):
        shaded = [shade * part for part in colour]
        axes.add_patch(Polygon(face, facecolor=shaded, edgecolor="black", linewidth=0.8))


@figure
def gates_at_start(gates: dict[str, Tensor]) -> Figure:
    """The weights a, b×L, of a batch of images, in one panel for each way to start `fc`."""
    drawn, panels = plt.subplots(
        1, len(gates), figsize=(WIDTH, 3.8), sharex=True, sharey=True, squeeze=False
    )
    for axes, (title, a) in zip(panels[0], gates.items()):
        b, L = a.shape
        spread = np.random.default_rng(0).uniform(-0.3, 0.3, (b, L))
        axes.axhline(0, color="black", linewidth=1)
        axes.axhline(1 / L, color=REFERENCE, linestyle="--", linewidth=1.5)
        axes.plot(np.arange(1, L + 1) + spread, a.numpy(), ".", color=GATE, markersize=3)
        axes.set(xlabel="branch", xticks=range(1, L + 1))
        axes.set_title(title, fontsize=DIAGRAM_TEXT)
        _large(axes)
    panels[0, 0].set_ylabel(f"weight a (n = {b} images)")
    return drawn


@figure
def cost_by_layer(table: pd.DataFrame) -> Figure:
    """Millions of multiply-adds of each block for one image, as written and as evaluated."""
    blocks = table[table["form"] != ""]
    drawn, axes = plt.subplots(figsize=(WIDTH, 1.4 + 0.65 * len(blocks)))
    ways = {"as written": REFERENCE, "as evaluated": BLOCK}
    for shift, (way, colour) in zip((-0.2, 0.2), ways.items()):
        millions = blocks[f"multiply-adds {way}"] / 1e6
        bars = axes.barh(np.arange(len(blocks)) + shift, millions, 0.38, color=colour, label=way)
        axes.bar_label(bars, fmt="%.1f", fontsize=DIAGRAM_TEXT, padding=3)
    axes.set_yticks(
        range(len(blocks)), [f"{name}, {form}" for name, form in blocks["form"].items()]
    )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="million multiply-adds per image")
    drawn.legend(loc="outside upper center", ncols=2, fontsize=DIAGRAM_TEXT)
    _large(axes)
    return drawn


@figure
def cost_by_branches(blocks: pd.DataFrame, steps: pd.DataFrame) -> Figure:
    """What L branches cost, as written (dashed) and as built (solid): single blocks, over one plain
    convolution, and a training step of the whole network, over the one as written with L = 1, in
    each number type.

    Args:
        blocks: `blocks.csv` of `helpers.bench`.
        steps: its `steps.csv`.
    """
    drawn, (left, right) = plt.subplots(1, 2, figsize=(1.6 * WIDTH, 4.6), sharey=True)
    swept = blocks[blocks["form"].isin(["branches", "auto"])]
    cases = {
        f"{c} → {out}, {size}×{size}": own
        for (c, out, size), own in swept.groupby(["in", "out", "map"], sort=False)
        if own["L"].nunique() > 1
    }
    networks = {}
    for precision, own in steps.groupby("precision", sort=False):
        one = own.query("L == 1 and form == 'branches'")["milliseconds"].item()
        networks[precision] = own.assign(ratio=own["milliseconds"] / one)
    for axes, curves in ((left, cases), (right, networks)):
        colours = COLOURS if axes is left else ["black", "0.6"]
        for (name, own), colour in zip(curves.items(), colours):
            for form, line in (("branches", "--"), ("auto", "o-")):
                one = own[own["form"] == form].sort_values("L")
                label = name if form == "auto" else None
                axes.plot(one["L"], one["ratio"], line, color=colour, label=label)
        axes.set_xticks(sorted(steps["L"].unique()))
        axes.grid(axis="y", alpha=0.4)
        axes.legend(fontsize=DIAGRAM_TEXT)
        axes.set_xlabel("branches L (dashed: as written, solid: as built)")
        _large(axes)
    left.set(title="a block, over one plain convolution (float32)", ylabel="time, as a ratio")
    right.set_title("a whole step, over that as written with L = 1")
    _large(left)
    return drawn


@figure
def two_losses(losses: dict[str, list[float]]) -> Figure:
    """The training loss of two networks that saw the same batches, each by its name."""
    drawn, axes = plt.subplots(figsize=(WIDTH, 3.8))
    for (name, values), colour in zip(losses.items(), (GATE, COLOURS[0])):
        smooth = pd.Series(values).rolling(40, min_periods=1).mean()
        step = np.arange(1, len(values) + 1)
        axes.plot(step, values, color=colour, alpha=0.2, linewidth=0.6)
        axes.plot(step, smooth, color=colour, linewidth=2, label=name)
    axes.set(xlabel=f"training batch (n = {len(values):,})", ylabel="cross-entropy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=DIAGRAM_TEXT)
    _large(axes)
    return drawn


def _large(axes: Axes) -> None:
    """Let the labels be as large as in the diagrams."""
    axes.tick_params(labelsize=DIAGRAM_TEXT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_size(DIAGRAM_TEXT)


# ---- 03 training


@figure
def batch_losses(
    batches: pd.DataFrame, sizes: Sequence[int] = (), restarts: Sequence[int] = ()
) -> Figure:
    """The loss of every training batch, with its mean over the last 20 batches.

    Args:
        sizes, restarts: as of `accuracy_by_epoch`.
    """
    drawn, axes = plt.subplots()
    step = np.arange(1, len(batches) + 1)
    axes.plot(step, batches["loss"], color=TRAINING, alpha=0.35, linewidth=0.8, label="each batch")
    smooth = batches["loss"].rolling(20, min_periods=1).mean()
    axes.plot(step, smooth, color=TRAINING, linewidth=1.8, label="mean of the last 20")
    ends = batches.groupby("epoch").size().cumsum()
    apart = math.ceil(len(ends) / 12)  # epochs from one line to the next, so that they can be told
    for end in ends.iloc[apart - 1 : -1 : apart]:
        axes.axvline(end + 0.5, color=REFERENCE, linewidth=0.6, linestyle=":")
    first_batches = [0.5, *(ends + 0.5)]
    _mark_epochs(axes, sizes, restarts, first_batches)
    dotted = "ends of epochs" if apart == 1 else f"every {apart} epochs"
    axes.set(
        xlabel=f"training batch (n = {len(batches):,}; dotted: {dotted})",
        ylabel="cross-entropy, smoothed labels",
        xlim=(0, len(batches) + 1),
    )
    axes.legend(frameon=True, edgecolor="none", framealpha=1)
    return drawn


def _pushed_apart(axes: Axes, x: pd.Series, y: pd.Series) -> pd.Series:
    """Heights of names, as fractions of the axes, for points at x and y; lowest first.

    Where points are of one height, the left one's name is above, so that a line from the right to
    its point passes above the other.
    """
    low, high = axes.get_ylim()
    order = pd.DataFrame({"y": y.round(1), "x": -x}).sort_values(["y", "x"]).index
    heights, gaps = (y[order] - low) / (high - low), 0.047 * np.arange(len(order))
    places = isotonic_regression(heights - gaps).x if len(order) else []
    return pd.Series(places + gaps, index=order)  # the least pushing that parts them


def _names_beside(axes: Axes, names: pd.Series, x: pd.Series, y: pd.Series) -> None:
    """The names of points at the right of the axes, each with a line to its point, or to all points
    that have this name; but beside the points of short trainings, where there is room. They are
    pushed apart where they would overlap.
    """
    short = x < ROOM_BESIDE
    beside = _pushed_apart(axes, x[short], y[short])
    for number, place in beside.items():
        axes.annotate(
            names[number], (x[number], y[number]), (1.2 * x[number], place),
            textcoords=("data", "axes fraction"), va="center", fontsize=DIAGRAM_TEXT,
        )  # fmt: skip
    names = names[~short]
    named = names.drop_duplicates().index
    for number, place in _pushed_apart(axes, x[named], y[named]).items():
        for point in names.index[names == names[number]]:
            axes.annotate(
                names[number] if point == number else "", (x[point], y[point]), (1.03, place),
                textcoords="axes fraction", va="center", fontsize=DIAGRAM_TEXT,
                arrowprops={
                    "arrowstyle": "-", "color": "0.75", "linewidth": 0.8, "shrinkB": 4,
                    "relpos": (0, 0.5),  # from the middle of the name's left side
                },
            )  # fmt: skip


# In `accuracy_by_cost`: the colours of the kinds of machine on record, those of others, and what
# has a name in both panels.
MACHINES = {
    "CPU, AVX2, float32": COLOURS[4],
    "CPU, AVX512, bfloat16": COLOURS[9],
    "CPU, AMX, bfloat16": COLOURS[1],
    "NVIDIA H100 80GB HBM3, bfloat16": COLOURS[2],
}
OTHER_MACHINES = [COLOURS[number] for number in (5, 0, 3, 8)]
NAMED_TWICE = {
    "longer-gpu": (-84, 2), "full": (6, 9), "hour": (6, -10), "hour-avx2": (6, -10),
    "quick": (6, -10),
}  # fmt: skip
ROOM_BESIDE = 1.5  # minutes; at the right of shorter trainings there are few others


@figure
def accuracy_by_cost(
    compared: pd.DataFrame, published: tuple[float, float, float] | None = None
) -> Figure:
    """Test accuracy against minutes of training and against multiply-adds, on logarithmic axes.

    Args:
        compared: `runs.by_cost()`; bars are standard deviations over seeds.
        published: accuracy, minutes and multiply-adds of the answer to compare with, if any.
    """
    others = itertools.cycle(OTHER_MACHINES)
    colours = {kind: MACHINES.get(kind) or next(others) for kind in sorted(set(compared["kind"]))}
    wider = {"width_ratios": (1.15, 1)}
    drawn, panels = plt.subplots(1, 2, figsize=(1.6 * WIDTH, 6.8), sharey=True, gridspec_kw=wider)
    for axes, column in zip(panels, ("minutes", "work")):
        for kind, own in compared.groupby("kind"):
            axes.errorbar(
                own[column], 100 * own["accuracy"], 100 * own["deviation"],
                own.get(f"{column}_deviation"), fmt="o", color=colours[kind], capsize=3,
                label=f"this project, {kind}",
            )  # fmt: skip
        axes.set_xscale("log")
        _large(axes)
    if published:
        accuracy, *costs = published
        for axes, cost in zip(panels, costs):
            axes.plot(
                cost, 100 * accuracy, "*", color=REFERENCE, markersize=14, zorder=5,
                markeredgecolor="white", label="published answer, a GPU",
            )  # fmt: skip
            axes.axhline(100 * accuracy, color=REFERENCE, linestyle="--", linewidth=1)
        panels[0].axvline(costs[0], color=REFERENCE, linestyle="--", linewidth=1)
    _names_beside(panels[0], compared["run"], compared["minutes"], 100 * compared["accuracy"])
    highest = compared.sort_values("accuracy").drop_duplicates("run", keep="last")
    for row in highest[highest["run"].isin(NAMED_TWICE)].itertuples():
        place = NAMED_TWICE[row.run]
        panels[1].annotate(
            row.run, (row.work, 100 * row.accuracy), place, textcoords="offset points",
            va="center", fontsize=DIAGRAM_TEXT,
        )  # fmt: skip
    panels[0].set(xlabel="minutes of training", ylabel="test accuracy in %")
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    panels[1].set_xlabel("multiply-adds of the training")
    legend = panels[1].get_legend_handles_labels()
    drawn.legend(*legend, loc="outside lower center", ncols=2, fontsize=DIAGRAM_TEXT)
    for axes in panels:
        _large(axes)
    return drawn


def _mark_epochs(
    axes: Axes, sizes: Sequence[int], restarts: Sequence[int], begins: Sequence[float]
) -> None:
    """Shade the epochs of small images, each size with its name, and draw a line before those that
    began again; `accuracy_by_epoch` explains both.

    Args:
        begins: where on the axis each epoch begins, and where the last one ends.
    """
    shade, epoch, last = "learnt from smaller images", 0, begins[-1] - begins[0]
    greys = itertools.cycle(("0.93", "0.97"))  # from one size to the next
    above = {"xycoords": ("data", "axes fraction"), "color": REFERENCE, "fontsize": 9, "va": "top"}
    for size, epochs in itertools.groupby(sizes[: len(begins) - 1]):
        begin, epoch = begins[epoch], epoch + len(list(epochs))
        end = begins[epoch]
        if size < IMAGE_SIZE:
            grey = next(greys)
            axes.axvspan(begin, end, color=grey, linewidth=0, label=shade)
            where, narrow = ((begin + end) / 2, 0.985), end - begin < 0.15 * last
            clear = {"facecolor": grey, "edgecolor": "none", "pad": 0.5}  # of dotted lines
            axes.annotate(
                f"{size}×{size}", where, ha="center", rotation=90 * narrow, bbox=clear, **above
            )
            shade = "_"  # named once
    for number in restarts:
        axes.axvline(begins[number - 1], color=REFERENCE, linewidth=0.8)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.annotate(" begun again", (begins[number - 1], 0.985), bbox=clear, **above)


@figure
def accuracy_by_epoch(
    history: pd.DataFrame,
    published: float | None = None,
    sizes: Sequence[int] = (),
    restarts: Sequence[int] = (),
) -> Figure:
    """Training, test and (where there is one) validation accuracy after each epoch.

    Args:
        history: a run's `history`, accuracies as fractions of one.
        published: an accuracy to draw as a line for comparison, or None.
        sizes: of the images in the epochs, in pixels; epochs of smaller than whole ones are shaded.
        restarts: epochs with which a run began that went on from another; a line is before each.
    """
    drawn, axes = plt.subplots()
    _mark_epochs(axes, sizes, restarts, np.arange(max(len(sizes), len(history)) + 1) + 0.5)
    every = "D--" if history["training_accuracy"].notna().all() else "D"
    marked = math.ceil(len(history) / 20)  # more markers than that hide the lines
    marks = [*range(0, len(history) - 1, marked), len(history) - 1]
    for column, name, colour, style in (
        ("training_accuracy_running", "training, while learning", TRAINING, "o-"),
        ("training_accuracy", "training, clean images", COLOURS[9], every),
        ("validation_accuracy", "validation", VALIDATION, "^-"),
        ("test_accuracy", "test", TEST, "s-"),
    ):
        known = history[["epoch", column]].dropna()
        if len(known):
            rare = marks if len(known) == len(history) else None
            axes.plot(
                known["epoch"], 100 * known[column], style, color=colour, label=name, markevery=rare
            )
    if published is not None:
        axes.axhline(
            100 * published, color=REFERENCE, linestyle="--", linewidth=1,
            label=f"published answer, {100 * published:.2f}%",
        )  # fmt: skip
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="accuracy in %")
    axes.legend(loc="best", frameon=True, edgecolor="none", framealpha=1)
    return drawn


# ---- 04 analysis


@figure
def confusion(counts: np.ndarray, names: Sequence[str]) -> Figure:
    """How often each true class (rows) is answered with each class (columns); counts.

    The colour shows the mistakes only: beside the right answers they would all look white.
    """
    drawn, axes = plt.subplots(figsize=(0.9 * WIDTH, 5.2))
    mistakes = counts * (1 - np.eye(len(names), dtype=int))
    texts = np.where(np.eye(len(names), dtype=bool), "", counts.astype(str))
    sns.heatmap(
        mistakes, annot=texts, fmt="", cmap="rocket_r", cbar=False, square=True, ax=axes,
        xticklabels=names, yticklabels=names, annot_kws={"size": 8},
    )  # fmt: skip
    for text, number in zip(axes.texts, mistakes.flat, strict=True):
        text.set_color("white" if number > mistakes.max() / 2 else "black")
    for k in range(len(names)):
        axes.add_patch(plt.Rectangle((k, k), 1, 1, facecolor="0.92"))
        axes.text(k + 0.5, k + 0.5, counts[k, k], ha="center", va="center", fontsize=8)
    axes.set(xlabel=f"answer (n = {counts.sum():,} test images)", ylabel="true class")
    axes.tick_params(axis="x", rotation=45)
    plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
    return drawn


@figure
def class_accuracies(table: pd.DataFrame) -> Figure:
    """Accuracy of each class with its 95% interval, the hardest at the bottom.

    Args:
        table: index the class, columns `accuracy`, `low`, `high` as fractions of one, `images`.
    """
    drawn, axes = plt.subplots(figsize=(WIDTH, 3.8))
    images = table["images"].iloc[0]
    table = 100 * table.sort_values("accuracy")[["accuracy", "low", "high"]]
    around = [table["accuracy"] - table["low"], table["high"] - table["accuracy"]]
    axes.errorbar(table["accuracy"], range(len(table)), xerr=around, fmt="o", color=TEST, capsize=3)
    axes.set_yticks(range(len(table)), table.index)
    axes.set_xlabel(f"test accuracy in %, 95% interval (n = {images:,} a class)")
    axes.grid(axis="x", alpha=0.4)
    return drawn


@figure
def reliability(measured: Calibration) -> Figure:
    """Share of right answers against confidence, with the number of images in each bin."""
    drawn, (upper, lower) = plt.subplots(
        2, 1, figsize=(WIDTH, 4.6), sharex=True, height_ratios=(3, 1)
    )
    upper.plot([0, 100], [0, 100], color=REFERENCE, linestyle="--", label="perfectly calibrated")
    low, high = np.transpose(
        [interval(round(n * share), n) for n, share in zip(measured.count, measured.accuracy)]
    )
    upper.errorbar(
        100 * measured.confidence, 100 * measured.accuracy,
        100 * np.stack([measured.accuracy - low, high - measured.accuracy]).clip(0),
        fmt="o-", color=TEST, capsize=2, label="test, with 95% intervals",
    )  # fmt: skip
    upper.set(ylabel="right answers in %")
    upper.legend()
    lower.plot(100 * measured.confidence, measured.count, "o", color=TEST)
    lower.vlines(100 * measured.confidence, 0.5, measured.count, color=TEST)
    lower.set(
        yscale="log",
        ylim=(0.5, None),
        ylabel="images",
        xlabel=f"probability given to the answer in % (n = {measured.count.sum():,})",
    )
    return drawn


@figure
def answered(table: pd.DataFrame) -> Figure:
    """Accuracy against the share of images that are answered, from `evaluation.answered`."""
    drawn, axes = plt.subplots()
    shares = table[table["answered"] >= 0.01]  # the first few jump
    axes.plot(100 * shares["answered"], 100 * shares["accuracy"], color=TEST)
    axes.set(xlabel="share of test images answered in %, surest first", ylabel="accuracy in %")
    axes.grid(alpha=0.4)
    return drawn


@figure
def robustness(table: pd.DataFrame) -> Figure:
    """Accuracy on worse and worse images, a panel a corruption, from `probing.robustness`."""
    kinds = table["corruption"].unique()
    drawn, panels = plt.subplots(1, len(kinds), figsize=(1.3 * WIDTH, 3.3), sharey=True)
    for axes, kind in zip(panels, kinds):
        rows = table[table["corruption"] == kind]
        around = 100 * np.array([rows["accuracy"] - rows["low"], rows["high"] - rows["accuracy"]])
        axes.errorbar(
            rows["step"], 100 * rows["accuracy"], around, fmt="o-", color=TEST, markersize=4
        )
        names = ["none", *(f"{strength:g}" for strength in rows["strength"].iloc[1:])]
        axes.set_xticks(rows["step"], names, rotation=60, fontsize=9)
        axes.set_xlabel(kind.replace(": ", ":\n"))
        axes.grid(axis="y", alpha=0.4)
    panels[0].set_ylabel(f"accuracy in % (n = {table['images'].iloc[0]:,})")
    return drawn


@figure
def occlusions(images: Tensor, losses: Sequence[Tensor], titles: Sequence[str]) -> Figure:
    """Images, uint8 n×3×h×w, above what covering each place costs the answer's probability, each
    map on a scale of its own, which ends at its largest change either way."""
    drawn, panels = plt.subplots(2, len(images), figsize=(1.3 * WIDTH, 3.1), squeeze=False)
    for (upper, lower), image, loss, title in zip(panels.T, images, losses, titles):
        _picture(upper, image)
        upper.set_title(title, fontsize=9)
        most = float(loss.abs().max())
        lower.imshow(loss, cmap="RdBu_r", vmin=-most, vmax=most)
        lower.set(xticks=[], yticks=[])
        lower.set_xlabel(f"up to {100 * most:.0f} points", fontsize=9)
        lower.spines[:].set_visible(False)
    return drawn


@figure
def neighbours(
    images: Tensor, titles: Sequence[str], near: Tensor, near_titles: Sequence[Sequence[str]]
) -> Figure:
    """Images, uint8 n×3×h×w, each at the left of its row of neighbours, n×k×3×h×w."""
    n, k = near.shape[:2]
    drawn, panels = plt.subplots(n, k + 1, figsize=(WIDTH, 1.45 * n), squeeze=False)
    for row, image, title, others, names in zip(panels, images, titles, near, near_titles):
        _picture(row[0], image)
        row[0].set_title(title, fontsize=8, color=COLOURS[3])
        for axes, other, name in zip(row[1:], others, names):
            _picture(axes, other)
            axes.set_title(name, fontsize=8)
    return drawn


# ---- 05 weights


@figure
def differences(compared: pd.DataFrame, base: str) -> Figure:
    """The difference of every variant to `base` with its interval, from `study.compare`."""
    rows = 100 * compared.drop(index=base)[["difference", "low", "high"]]
    drawn, axes = plt.subplots(figsize=(WIDTH, 0.33 * len(rows) + 0.9))
    around = [rows["difference"] - rows["low"], rows["high"] - rows["difference"]]
    axes.errorbar(
        rows["difference"], range(len(rows)), xerr=around, fmt="o", color=VALIDATION, capsize=3
    )
    axes.axvline(0, color=REFERENCE, linestyle="--", linewidth=1)
    seeds = compared["n"].drop(index=base)
    axes.set_yticks(range(len(rows)), [f"{name} (n = {n})" for name, n in seeds.items()])
    axes.invert_yaxis()
    axes.set_xlabel(f"points more than {base}, joint 95% intervals")
    axes.grid(axis="x", alpha=0.4)
    return drawn


@figure
def entropies_by_epoch(
    history: pd.DataFrame, sizes: Sequence[int] = (), restarts: Sequence[int] = ()
) -> Figure:
    """The mean entropy of each block's a after each epoch, as a share of its maximum; three blocks
    a panel.

    Args:
        sizes, restarts: as of `accuracy_by_epoch`.
    """
    columns = [name for name in history if name.startswith("entropy_")]
    parts = [columns[k : k + 3] for k in range(0, len(columns), 3)]
    drawn, panels = plt.subplots(
        1, len(parts), figsize=(1.5 * WIDTH, 3.2), sharey=True, squeeze=False
    )
    every = math.ceil(len(history) / 15)  # more markers than that hide the lines
    begins = np.arange(max(len(sizes), len(history)) + 1) + 0.5
    for axes, part in zip(panels.flat, parts, strict=True):
        _mark_epochs(axes, sizes, restarts, begins)
        lines = []
        for name, colour, marker in zip(part, (COLOURS[4], COLOURS[9], COLOURS[5]), "osD"):
            block, style = name.removeprefix("entropy_"), {"marker": marker, "markevery": every}
            lines += axes.plot(history["epoch"], history[name], color=colour, label=block, **style)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.set(xlabel="epoch", ylim=(0, 1.25))
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.spines["left"].set_bounds(0, 1)  # above are the names of the epochs
        axes.legend(
            handles=lines, ncols=3, loc="lower right", frameon=True, edgecolor="none", framealpha=1,
            handlelength=1, columnspacing=1,
        )  # fmt: skip
    panels[0, 0].set_ylabel("entropy of a (share of log L)")
    return drawn


@figure
def gates_by_class(
    means: Sequence[Tensor], names: Sequence[str], kernels: Sequence[Sequence[str]]
) -> Figure:
    """Mean a of each class in each block: one panel a block, a row a class, a column a branch; of
    two branches whose weights add up to 1 only the first, since the other is its mirror image.

    The colour is the difference from the branch's mean over classes, on one scale for all.

    Args:
        means: of each block, classes×L.
        names: of the classes.
        kernels: of each block, what to call its branches.
    """
    differences = [(a - a.mean(dim=0)).numpy() for a in means]
    limit = max(np.abs(d).max() for d in differences)
    limit = limit if limit > 1e-6 else 1.0  # rounding is no difference
    for number, a in enumerate(means):
        if a.shape[1] == 2 and np.allclose(a.sum(dim=1), 1, atol=1e-4):
            differences[number] = differences[number][:, :1]
    widths = [d.shape[1] for d in differences]
    drawn, axes = plt.subplots(
        1, len(means), figsize=(WIDTH + 0.8, 3.9), sharey=True, width_ratios=widths, squeeze=False
    )
    drawings = zip(axes.flat, differences, means, kernels, strict=True)
    for number, (place, shown, a, kinds) in enumerate(drawings, start=1):
        ticks = [f"{kind}\n{mean:.2f}" for kind, mean in zip(kinds, a.mean(dim=0), strict=True)]
        ticks = (ticks if shown.shape[1] <= 2 else kinds)[: shown.shape[1]]  # two lines need room
        sns.heatmap(
            shown, ax=place, cmap="vlag", vmin=-limit, vmax=limit, cbar=number == len(means),
            yticklabels=names, xticklabels=ticks,
            cbar_kws={
                "label": "difference from the mean a", "ticks": [-limit, 0, limit],
                "format": "{x:+.2f}",
            },
        )  # fmt: skip
        place.set_title(f"B{number}")
        upright = shown.shape[1] == 1  # there is room for that
        place.tick_params(axis="x", labelsize=9 if upright else 8, labelrotation=90 * (not upright))
        place.tick_params(axis="y", length=0)
    means_too = ", each with its mean a" if max(widths) <= 2 else ""
    drawn.supxlabel(f"branches, by their kernels{means_too}", fontsize=11)
    return drawn


@figure
def gate_entropies(entropies: Sequence[Tensor]) -> Figure:
    """The entropy of a of each image, as a share of log L: one violin a block."""
    drawn, axes = plt.subplots(figsize=(WIDTH, 3.0))
    sns.violinplot(
        [e.numpy() for e in entropies],
        ax=axes,
        color=COLOURS[9],
        inner="quart",
        cut=0,
        density_norm="width",
    )
    axes.set_xticks(range(len(entropies)), [f"B{k}" for k in range(1, len(entropies) + 1)])
    axes.set(
        xlabel=f"intermediate block (n = {len(entropies[0]):,} test images)",
        ylabel="entropy of a / log L",
        ylim=(None, 1.02),
    )
    return drawn
