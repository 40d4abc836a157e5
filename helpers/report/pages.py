"""Pages that a browser shows offline: the notebooks, an overview that leads with the result, and
the explorer of single test images."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from jinja2 import DictLoader, Environment, pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from PIL import Image
from torch import Tensor

from helpers import data, evaluation, runs
from helpers.project import write_file
from helpers.report.execute import NOTEBOOKS, SEQUENCE
from helpers.report.pdf import plots
from helpers.settings import Settings

STAND_IN = "SYNTHETIC STAND-IN DATA: the numbers on this page say nothing about CIFAR-10."
PAGES = [
    *((f"{name}.html", name.replace("_", " ")) for name in SEQUENCE),
    ("explorer.html", "explorer: single images"),
    ("report.pdf", "three pages to print (PDF)"),
]
SHOWN, COLUMNS = 300, 20  # images in the explorer, about 3 kB each; columns of their picture


class MathRenderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML, which browsers draw without MathJax."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def latex_environment(self, name: str, body: str) -> str:
        return convert(rf"\begin{{{name}}}{body}\end{{{name}}}", display="block")


class PageExporter(HTMLExporter):
    """A notebook to a page that needs nothing beside itself, network included."""

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = MathRenderer(escape=False, embed_images=True, path=str(NOTEBOOKS))
        return MarkdownWithMath(renderer=renderer).render(source)


def template(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def render(notebook: NotebookNode, target: Path, dataset: str) -> None:
    """Write `notebook` as the page `target`; on any `dataset` but CIFAR-10 it says so on top."""
    stand_in = dataset != "cifar10"
    heading = re.search(r"^# (.+)$", "\n".join(cell.source for cell in notebook.cells), re.M)
    resources = {
        "metadata": {"name": heading[1] + " (stand-in data)" * stand_in},
        "stand_in": STAND_IN * stand_in,
        "pages": [("index.html", "overview"), *PAGES],
    }
    loader = DictLoader({"page.html.j2": template("page.html.j2")})
    exporter = PageExporter(template_file="page.html.j2", extra_loaders=[loader], embed_images=True)
    html, _ = exporter.from_notebook_node(notebook, resources)
    for name in SEQUENCE:  # links from notebook to notebook become links from page to page
        html = html.replace(f'href="{name}.ipynb', f'href="{name}.html')
    write_file(target, html)


def write_overview(run: runs.Run, images: data.ImageData, folder: Path) -> Path:
    """Write `explorer.html` and `index.html`, which it returns, from a run with its weights."""
    content = explorer_content(run, images)
    # In a script, "</" could end it.
    script = json.dumps(content, separators=(",", ":")).replace("</", "<\\/")
    write_file(folder / "explorer.html", template("explorer.html").replace("{{ content }}", script))

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template("index.html.j2")).render(
        content=content,
        run=run,
        hardware=runs.hardware_of(run),
        settings=run.settings.model_dump(),
        defaults=Settings().model_dump(),
        plots=plots(run),
        pages=PAGES,
    )
    write_file(folder / "index.html", html)
    return folder / "index.html"


def explorer_content(run: runs.Run, images: data.ImageData) -> dict[str, Any]:
    """What the explorer shows: images in one picture, and what the network says of each; half of
    them drawn among its mistakes. Numbers are rounded to a thousandth."""
    network = runs.load_network(run)
    test = data.parts(images, test_images=run.settings.test_images)[2]
    logits, labels = evaluation.predict(network, test), test.labels
    a, wrong = evaluation.gates(network, test), logits.argmax(dim=1) != labels
    generator = torch.Generator().manual_seed(0)
    some = [which.nonzero().flatten() for which in (wrong, ~wrong)]
    some = [n[torch.randperm(len(n), generator=generator)][: SHOWN // 2] for n in some]
    shown = torch.cat(some).sort().values
    return {
        "stand_in": STAND_IN * (images.name != "cifar10"),
        "about": f"Run {run.name} classifies {int((~wrong).sum()):,} of {len(labels):,} test "
        f"images correctly. {len(some[0])} of the {len(shown)} images shown were drawn among its "
        "mistakes. Click on an image to see the vector a of every block.",
        "classes": list(images.classes),
        "columns": COLUMNS,
        "picture": picture(test.images[shown]),
        "kernels": [["{}×{}".format(*C.kernel_size) for C in block.branches]
                    for block in network.blocks],
        "class_means": [rounded(evaluation.class_means(block, labels)) for block in a],
        "images": [
            {"number": i, "place": place, "label": int(labels[i]),
             "predicted": int(logits[i].argmax()),
             "probabilities": rounded(logits[i].softmax(dim=0)), "a": [rounded(b[i]) for b in a]}
            for place, i in enumerate(shown.tolist())
        ],
    }  # fmt: skip


def rounded(values: Tensor) -> list:
    return (values.double() * 1000).round().div(1000).tolist()


def picture(images: Tensor) -> str:
    """Images, uint8 n×3×h×w, in rows of `COLUMNS`, as a data URL."""
    n, _, h, w = images.shape
    grid = torch.zeros(-(-n // COLUMNS) * COLUMNS, 3, h, w, dtype=torch.uint8)
    grid[:n] = images
    pixels = grid.view(-1, COLUMNS, 3, h, w).permute(0, 3, 1, 4, 2).reshape(-1, COLUMNS * w, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
