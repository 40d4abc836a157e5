"""Pages that a browser shows offline: the notebooks, an overview that leads with the result, and
the explorer of individual test images; and the README's table of results."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, FileSystemLoader, pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from helpers import data, evaluation, runs
from helpers.project import ROOT, ProjectError, write_file
from helpers.report.execute import SEQUENCE
from helpers.report.pdf import plots
from helpers.settings import Settings

STAND_IN = "SYNTHETIC STAND-IN DATA: the numbers on this page say nothing about CIFAR-10."
PAGES = [
    *((f"{name}.html", name.replace("_", " ")) for name in SEQUENCE),
    ("explorer.html", "explorer: single images"),
    ("report.pdf", "three-page report (PDF)"),
]
SHOWN = 300  # images in the explorer, about 3 kB each
TEMPLATES = FileSystemLoader(Path(__file__).parent)
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
HEAD = """\
| what | hardware | minutes | reference epochs | test accuracy (%) | six views (%) | n |
|:--|:--|--:|--:|--:|--:|--:|
"""


class MathRenderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML, which browsers draw without MathJax."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")


class PageExporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source: str) -> str:
        return MarkdownWithMath(renderer=MathRenderer(escape=False)).render(source)


def render(notebook: NotebookNode, target: Path, dataset: str) -> None:
    """Write `notebook` as the page `target`, self-contained and readable offline; on
    any `dataset` but CIFAR-10 it says so on top."""
    resources = {
        "metadata": {"name": target.stem.replace("_", " ")},
        "stand_in": STAND_IN * (dataset != "cifar10"),
        "pages": [("index.html", "overview"), *PAGES],
    }
    exporter = PageExporter(template_file="page.html.j2", extra_loaders=[TEMPLATES])
    write_file(target, exporter.from_notebook_node(notebook, resources)[0])


def write_overview(run: runs.Run, images: data.ImageData, folder: Path) -> Path:
    """Write `explorer.html` and `index.html`, which it returns, from a run with its weights."""
    environment = Environment(loader=TEMPLATES, autoescape=True, trim_blocks=True)
    given = {
        "stand_in": STAND_IN * (images.name != "cifar10"),
        "content": explorer_content(run, images),
        "run": run,
        "hardware": runs.hardware_of(run),
        "defaults": Settings(),
        "plots": plots(run),
        "pages": PAGES,
    }
    for page in ("explorer.html", "index.html"):
        write_file(folder / page, environment.get_template(f"{page}.j2").render(given))
    return folder / "index.html"


def explorer_content(run: runs.Run, images: data.ImageData) -> dict[str, Any]:
    """What the explorer shows: images, half of them drawn among the network's mistakes, and what
    it says of each. Numbers are rounded to a thousandth."""
    network = runs.load_network(run)
    test = images.test.first(run.settings.test_images)
    logits, a = evaluation.predict(network, test), evaluation.gates(network, test)
    right = evaluation.is_correct(logits, test.labels)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    mistakes, others = (order[right[order] == which][: SHOWN // 2] for which in (False, True))
    return {
        "classes": images.classes,
        "kernels": [["{}×{}".format(*C.kernel_size) for C in block.branches]
                    for block in network.blocks],
        "class_means": [rounded(evaluation.class_means(block, test.labels)) for block in a],
        "images": [
            {"number": i, "label": int(test.labels[i]), "predicted": int(logits[i].argmax()),
             "picture": picture(test.images[i]), "a": [rounded(block[i]) for block in a],
             "probabilities": rounded(logits[i].softmax(dim=0))}
            for i in sorted([*mistakes.tolist(), *others.tolist()])
        ],
    }  # fmt: skip


def rounded(values: Tensor) -> list:
    return (values.double().nan_to_num() * 1000).round().div(1000).tolist()


def picture(image: Tensor) -> str:
    """An image, uint8 3×h×w, as a data URL."""
    file = io.BytesIO()
    to_pil_image(image).save(file, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# ---- the README
def results_table() -> str:
    """This project's recipes, the quickest first; the best earlier one; the published report."""
    best = runs.history().nlargest(1, "accuracy")
    best = best.rename(columns={"name": "preset", "machine": "hardware"})
    best["reference_epochs"] = float("nan")
    rows = [HEAD]
    for what, table in (("", runs.results()), ("best earlier recipe, ", best)):
        for row in table.itertuples():
            epochs = "" if pd.isna(row.reference_epochs) else f"{row.reference_epochs:.1f}"
            deviation = "" if pd.isna(row.deviation) else f" ± {100 * row.deviation:.2f}"
            rows.append(
                f"| {what}`{row.preset}` | {row.hardware} | {row.minutes:.1f} | {epochs} "
                f"| {100 * row.accuracy:.2f}{deviation} | {100 * row.tta:.2f} | {row.n} |\n"
            )
    minutes, accuracy = evaluation.PUBLISHED_MINUTES, 100 * evaluation.PUBLISHED
    rows.append(f"| published report | a GPU | {minutes} | | {accuracy:.2f} | | 1 |\n")
    return "".join(rows)


def with_table(text: str) -> str:
    """The README with the current table."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ProjectError(f"README.md must contain {BEGIN.strip()} and {END}; put them back.")
    return before + BEGIN + results_table() + END + after


def update_readme() -> None:
    """Rewrite the README's table of results, between its two markers, from the records."""
    write_file(README, with_table(README.read_text(encoding="utf-8")))
