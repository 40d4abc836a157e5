"""The sheet's hand-in, `handin/report.ipynb` and `handin/report.pdf`: `make handin`.

The notebook writes the modules and tables that it needs, then tells the five notebooks as chapters;
so it runs on Google Colab from nothing. It is executed beside the record of the submitted run, so
that nothing is trained again and all outputs are real.
"""

from __future__ import annotations

import argparse
import ast
import json
import pprint
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers import data, runs
from helpers.project import ROOT, RUNS, command, shown
from helpers.report.execute import NOTEBOOKS, SEQUENCE, check_outputs, execute, submitted
from helpers.report.pdf import make_pdf
from helpers.settings import Settings

HANDIN = ROOT / "handin"
INTRODUCTION = """# CIFAR-10 with input-weighted convolution blocks

**{accuracy:.2%} test accuracy** ({tta:.2%} with six views), run `{run}`.

The modules that the report calls, then its five chapters. On Google Colab choose a runtime with a
GPU and run all cells: CIFAR-10 is downloaded, and the network is trained. The outputs shown are
those of the submitted run, whose record and weights were there already."""
CODE = """## The code

Each cell writes a module, or a table of earlier results, to where the chapters read it."""
START = """## Parameters and data

The parameters of the submitted run are checked before anything is computed. The images are read
once, for all chapters."""


def make_notebook(run: runs.Run) -> NotebookNode:
    """The single notebook, not executed, with the parameters of a run."""
    chapters = [nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in SEQUENCE]
    training = {kind_of(cell): cell.source for cell in chapters[2].cells}  # all parameters
    setups = [cell.source for one in chapters for cell in one.cells if kind_of(cell) == "setup"]
    lines = "\n".join(source.split("sys.path")[-1].partition("\n")[2] for source in setups)
    imports = sorted(
        dict.fromkeys(lines.split("\n")), key=lambda line: ("(" in line, "helpers" in line)
    )
    parameters = with_values(training["parameters"], run.settings)
    files, metrics = written_files(), run.metrics
    introduction = INTRODUCTION.format(
        run=run.name, accuracy=metrics["test_accuracy"], tta=metrics["test_accuracy_tta"]
    )
    cells = [
        new_markdown_cell(introduction),
        new_markdown_cell(CODE),
        new_code_cell("!mkdir -p " + " ".join(dict.fromkeys(shown(f.parent) for f in files))),
        *(new_code_cell(file_cell(file)) for file in files),
        new_markdown_cell(START),
        new_code_cell("\n".join(imports).strip()),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(training["check"]),
        *(cell for chapter in chapters for cell in chapter_cells(chapter)),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same hand-in gives the same file
    return new_notebook(cells=cells, metadata={"kernelspec": chapters[0].metadata.kernelspec})


def kind_of(cell: NotebookNode) -> str:
    """What kind of cell this is, if it is one of those that stand once, at the top."""
    if cell.cell_type != "code":
        return ""
    if "parameters" in cell.metadata.get("tags", []):
        return "parameters"
    return "setup" if "sys.path" in cell.source else "check" * ("check_parameters(" in cell.source)


def written_files() -> list[Path]:
    """The modules that the notebooks call, and the tables that they read."""
    patterns = "helpers/*.py", "helpers/*.cpp", "notebooks/runs/*.csv", "notebooks/benchmarks/*.csv"
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def file_cell(path: Path) -> str:
    return f"%%writefile {shown(path)}\n{path.read_text(encoding='utf-8').rstrip()}"


def with_values(source: str, settings: Settings) -> str:
    """A parameters cell with the values of a run."""
    values = json.loads(settings.model_dump_json())
    values["blocks"] = [block.model_dump(exclude_defaults=True) for block in settings.blocks]
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        first, last = node.value.lineno - 1, node.value.end_lineno - 1
        value = pprint.pformat(values[node.targets[0].id], width=90, sort_dicts=False)
        value = value.replace("'", '"')
        rest = lines[last][node.value.end_col_offset :]
        lines[first : last + 1] = [lines[first][: node.value.col_offset] + value + rest]
    return "\n".join(lines)


def chapter_cells(chapter: NotebookNode) -> list[NotebookNode]:
    """The cells of a notebook as those of a chapter, without what stands once at the top."""
    kept: list[NotebookNode] = []
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"\[([^]]*)\]\((?!http)[^)]*\)", r"\1", cell.source)  # links to files
            text = re.sub(r"^# 0(\d)", r"# Chapter \1", text)
            kept.append(new_markdown_cell(re.sub(r"\bnotebook 0(\d)", r"chapter \1", text)))
        elif not kind_of(cell):
            kept.append(new_code_cell(cell.source))
        elif kept[-1].cell_type == "markdown" and not kept[-1].source.startswith("# "):
            kept.pop()  # what introduced it
    return kept


def write() -> None:
    """Make the two files.

    Raises:
        ReportError: the notebook stopped, or its outputs hold what they should not.
        RunError: the submitted run's record or weights are not here, or it saw other data.
    """
    run = runs.read(submitted())
    runs.load_network(run)
    runs.check_same_data(run, data.load_data())
    with tempfile.TemporaryDirectory(prefix="handin-") as folder:
        place = Path(folder)
        shutil.copytree(RUNS, place / "notebooks" / "runs")
        nbformat.write(make_notebook(run), place / "report.ipynb")
        notebook = execute("report", place / "done.ipynb", {}, place)
    del notebook.metadata["papermill"]
    for cell in notebook.cells:
        cell.metadata = {"tags": [kind_of(cell)]} if kind_of(cell) == "parameters" else {}
    check_outputs("report.ipynb", notebook)
    HANDIN.mkdir(exist_ok=True)
    nbformat.write(notebook, HANDIN / "report.ipynb")
    make_pdf(run, HANDIN / "report.pdf")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.report.handin", description=__doc__)
    parser.parse_args(arguments)
    with command("the hand-in is as it was"):
        write()
        print("handin/report.ipynb and handin/report.pdf are ready.")


if __name__ == "__main__":
    main()
