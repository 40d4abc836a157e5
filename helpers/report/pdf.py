"""The sheet's PDF of one run, at most three pages: `report.typ` makes every sentence from the run's
own parameters and record."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pandas as pd
import typst
from matplotlib.figure import Figure

from helpers import evaluation, figures, runs, study
from helpers.model import layer_table
from helpers.project import write_file
from helpers.report.execute import submitted


def make_pdf(run: runs.Run, target: Path) -> None:
    template, content, drawn = Path(__file__).with_name("report.typ"), pdf_content(run), plots(run)
    if content["history"]:
        drawn["ladder"] = as_svg(figures.ladder(study.ladder()))
    given = {"data": json.dumps(content | {"plots": drawn})}
    write_file(target, typst.compile(template, sys_inputs=given))


def plots(run: runs.Run) -> dict[str, str]:
    """The figures that the PDF and the overview show, as SVG, in which their text has its size."""
    figures.use_style()
    network = figures.network_diagram(run.settings.network())
    network.set_size_inches(6.7, 1.9)  # flat: the first page has to hold much
    network.axes[0].set_ylabel("feature map\n(pixels)")
    return {
        "block": as_svg(figures.block_diagram()),
        "network": as_svg(network),
        "losses": as_svg(figures.batch_losses(run.batches, list(run.history["size"]))),
        "accuracy": as_svg(figures.accuracy_by_epoch(run.history)),
    }


def as_svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def pdf_content(run: runs.Run) -> dict[str, Any]:
    """What `report.typ` builds its text from. The project's history belongs to its own run."""
    settings, metrics = run.settings, run.metrics
    # What follows a block stands in its row of the table of layers.
    layers = layer_table(settings.network()).rename(index=lambda name: name.removeprefix("after "))
    together = {"what": "; ".join, "output": "last", "parameters": "sum", "multiply_adds": "sum"}
    of_project = run.name == submitted() and metrics["dataset"] == "cifar10"
    images = settings.test_images or 10_000
    return {
        "settings": settings.model_dump(),
        "metrics": metrics,
        "hardware": runs.hardware_of(run),
        "images": images,
        "interval": evaluation.interval(round(metrics["test_accuracy"] * images), images),
        "layers": records(layers.groupby("layer", sort=False).agg(together).reset_index()),
        "seeds": records(runs.seeds_of(run)),
        "history": records(runs.history()) if of_project else [],
    }


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, with None for what is missing."""
    return json.loads(table.to_json(orient="records"))
