"""The sheet's hand-in, `handin/report.ipynb` and `handin/report.pdf`: `make handin`.

The notebook writes the modules and tables that it needs, then tells the five notebooks one after
another; so it runs on Google Colab from nothing. It is executed beside the record of the submitted
run, so that nothing is trained again and all outputs are real.
"""

from __future__ import annotations

import pprint
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import data, runs
from helpers.project import ROOT, RUNS, short
from helpers.report.execute import NOTEBOOKS, SEQUENCE, execute, submitted
from helpers.report.pdf import make_pdf

HANDIN = ROOT / "handin"
FILES = (
    "helpers/*.py", "helpers/*.cpp", "notebooks/parameters/*.yaml", "notebooks/runs/*.csv",
    "notebooks/runs/*.yaml", "notebooks/benchmarks/*.csv",
)  # fmt: skip
INTRODUCTION = """# CIFAR-10 with input-weighted convolution blocks

**{test_accuracy:.2%} test accuracy** ({test_accuracy_tta:.2%} with six views), run `{run}`.

The modules that the report calls, then its five notebooks, 01 to 05. On Google Colab choose a
runtime with a GPU and run all cells: CIFAR-10 is downloaded, and the network is trained. The
outputs shown are those of the submitted run, whose record was available."""
CODE = """## The code

Each cell writes a module, or a table of earlier results, to where the notebooks read it."""
PARAMETERS = """## Parameters and data

First every parameter, with its default."""
CHANGED = """Then the values of the submitted run, where they differ. All are checked before the
images are read, once for all notebooks."""


def make_notebook(run: runs.Run) -> NotebookNode:
    """The single notebook, to be executed, with the parameters of a run."""
    notebooks = [nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in SEQUENCE]
    training = notebooks[2].cells  # its parameters are all that there are
    files = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    changed = run.settings.model_dump(exclude_defaults=True)
    cells = [
        new_markdown_cell(INTRODUCTION.format(**run.metrics | {"run": run.name})),
        new_markdown_cell(CODE),
        new_code_cell("!mkdir -p " + " ".join(dict.fromkeys(short(f.parent) for f in files))),
        *(new_code_cell(f"%%writefile {short(f)}\n{f.read_text('utf-8').rstrip()}") for f in files),
        new_markdown_cell(PARAMETERS),
        new_code_cell(training[3].source),
        new_markdown_cell(CHANGED),
        new_code_cell("\n".join(assignment(name, changed[name]) for name in changed)),
        new_code_cell(f"{imports(training)}\n\n{training[5].source}"),
    ]
    for notebook in notebooks:
        title, _, _, _, _, _, *story = notebook.cells
        cells += [title, new_code_cell(imports(notebook.cells)), *story]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same hand-in gives the same file
    return new_notebook(cells=cells, metadata={"kernelspec": notebooks[0].metadata.kernelspec})


def imports(cells: list[NotebookNode]) -> str:
    """A notebook's second cell without its first two paragraphs, which find the helpers."""
    return cells[1].source.split("\n\n", 2)[2]


def assignment(name: str, value: object) -> str:
    written = pprint.pformat(value, width=80, sort_dicts=False).replace("'", '"')
    return f"{name} = " + written.replace("\n", "\n" + " " * len(f"{name} = "))


def make_handin() -> None:
    """Make the two files."""
    run = runs.read(submitted())  # with its weights and data, or the notebook would train it
    runs.load_network(run)
    runs.check_same_data(run, data.load_data())
    with tempfile.TemporaryDirectory(prefix="handin-") as folder:
        place = Path(folder)
        shutil.copytree(RUNS, place / "notebooks" / "runs")
        nbformat.write(make_notebook(run), place / "report.ipynb")
        notebook = execute("report", place / "done.ipynb", {}, place)
    del notebook.metadata["papermill"]
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, HANDIN / "report.ipynb")
    make_pdf(run, HANDIN / "report.pdf")
    print(f"Wrote {short(HANDIN / 'report.ipynb')} and its PDF.")
