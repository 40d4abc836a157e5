"""The hand-in that the sheet wants: one zip with a PDF and a single notebook: `make handin`.

    python -m helpers.handin

The notebook is put together from the five notebooks and from the modules that they call, which its
first cells write beside it. It needs nothing else of the project, and is meant to run on Google
Colab as it is (a test runs it in an empty folder; on Colab it was not tried). Its parameters and
outputs are those of the best network: the first two notebooks are executed for it, the outputs of
the training come from the record, those of the analysis are the stored ones. The result is
`report/handin.zip`.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import pprint
import re
import zipfile
from typing import IO

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from helpers import data, report, runs

FOLDER = "input-weighted-convolution"  # in the zip
MODULES = (
    "__init__.py", "data.py", "augment.py", "mixing.cpp", "mixing.py", "model.py", "evaluation.py",
    "probing.py", "runs.py", "training.py", "figures.py",
)  # fmt: skip
# What a chapter does not repeat, because it stands at the notebook's top.
AT_THE_TOP = ("import sys\nfrom pathlib import Path", "settings = runs.check", "images = data.load")
# What reads records that only the whole project has; here stands what it gave.
PROJECT_ONLY = ("runs.benchmark", "study.")

INTRODUCTION = """# CIFAR-10 with input-weighted convolution blocks

{result}

This is the whole report in one notebook: the modules of its code first, then five chapters: the
data, the model, the training, what came of it, and the weights *a*. It needs no file beside it. On
Google Colab choose a runtime with a GPU, and run all cells: CIFAR-10 is downloaded, and everything
that the notebook imports is there already. The outputs are those of the run `{run}`."""
CODE = """## The code

Each of the following cells writes a module into the folder `helpers/`, in the order in which they
are used; the chapters import them from there and show the important parts again."""
START = """## What can be changed

All parameters of the report. They are checked before anything is computed, and the images are read
once for all chapters."""

EARLIER = """**A training before the training.** The run of chapter 3 does not begin with fresh
weights but with those that another one, named by `start_from`, ended with. That one has the same
parameters but for these."""
TRAIN_EARLIER = """from dataclasses import replace

from helpers import training

first = settings.start_from
if first and first not in runs.names():
    training.train(images, replace(settings, run=first, start_from="", **of_the_first))"""


class HandinError(Exception):
    """The hand-in cannot be made; the message says what is missing."""


def make_chapters(run: runs.Run) -> list[NotebookNode]:
    """The five notebooks with the outputs that belong to a run.

    Raises:
        HandinError: the record holds no executed notebook.
        ReportError: a notebook stopped.
    """
    chapters = []
    for name in report.SEQUENCE:
        stored = nbformat.read(report.NOTEBOOKS / f"{name}.ipynb", as_version=4)
        if name == report.TRAINING:
            stored = with_outputs_of_run(stored, run)
        elif name[:2] in ("01", "02"):
            target = report.REPORT / "handin" / f"{name}.ipynb"
            target.parent.mkdir(parents=True, exist_ok=True)
            executed, _ = report.execute(name, target, run.config)
            stored = report.with_outputs(stored, without_injected(executed))
        chapters.append(stored)
    return chapters


def executed_training(run: runs.Run) -> NotebookNode:
    """The training notebook that made a run, as it is kept with its record."""
    path = run.folder / f"{report.TRAINING}.ipynb"
    if not path.is_file():
        raise HandinError(
            f"{runs.place(path)} is missing, which `make report` keeps; make the run with that."
        )
    return without_injected(nbformat.read(path, as_version=4))


def with_outputs_of_run(stored: NotebookNode, run: runs.Run) -> NotebookNode:
    """The training notebook with the outputs of a run; the code that it shows stays today's.

    Raises:
        HandinError: the run was made with a notebook of other cells.
    """
    executed = executed_training(run)
    kinds, of_run = ([cell.cell_type for cell in one.cells] for one in (stored, executed))
    if kinds != of_run:
        raise HandinError(
            f"Notebook 03 has other cells than when it made {run.name}, so that the outputs of "
            "then have no place; make the run again."
        )
    for cell, done in zip(stored.cells, executed.cells, strict=True):
        if cell.cell_type == "code" and "getsource" not in cell.source:
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return stored


def without_injected(notebook: NotebookNode) -> NotebookNode:
    """A notebook without the cell of parameters that papermill put in."""
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    return notebook


def make_notebook(chapters: list[NotebookNode], run: runs.Run) -> NotebookNode:
    """The single notebook, from chapters with outputs, with the parameters of a run.

    Raises:
        HandinError: a chapter has no outputs.
    """
    notebook = new_notebook(metadata=dict(chapters[0].metadata))
    notebook.cells = [
        new_markdown_cell(INTRODUCTION.format(run=run.name, result=report.result(run))),
        new_markdown_cell(CODE),
        code("from pathlib import Path\n\nPath('helpers').mkdir(exist_ok=True)"),
        *(cell for name in MODULES for cell in module_cells(name)),
        new_markdown_cell(START), *starting_cells(chapters, run),
        *(cell for chapter in chapters for cell in chapter_cells(chapter)),
    ]  # fmt: skip
    executed = (cell for cell in notebook.cells if cell.cell_type == "code")
    for count, cell in enumerate(executed, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same hand-in gives the same file
    nbformat.validate(notebook)
    return notebook


def code(source: str, printed: str = "") -> NotebookNode:
    outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
    return new_code_cell(source, outputs=outputs)


def module_cells(name: str) -> list[NotebookNode]:
    """A heading with the module's own first sentence, and the cell that writes it."""
    path = f"helpers/{name}"
    source = (data.ROOT / path).read_text(encoding="utf-8")
    if name.endswith(".py"):
        first = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    else:
        first = source.split("\n")[0].removeprefix("// ")
    return [
        new_markdown_cell(f"### {path}\n\n{first}"),
        code(f"%%writefile {path}\n{source.rstrip()}", f"Writing {path}\n"),
    ]


def starting_cells(chapters: list[NotebookNode], run: runs.Run) -> list[NotebookNode]:
    """Imports, one cell with the parameters of all chapters, their check, the data, and the run
    from which the given one went on, if any."""
    lines: dict[str, str] = {}
    for chapter in sorted(chapters, key=lambda chapter: -len(parameter_lines(chapter))):
        for line in parameter_lines(chapter) + undeclared():
            name, comment = re.match(r"(\w+)(?: =|:) .*?(  # .*)", line).groups()
            value = "" if name == "run" else runs.parameters_of(run)[name]  # a run of its own
            lines.setdefault(
                name, f"{name} = {json.dumps(value) if isinstance(value, str) else value}{comment}"
            )
    parameters = code("\n".join(lines.values()))
    parameters.metadata.tags = ["parameters"]
    load = next(cell for cell in chapters[0].cells if cell.source.startswith(AT_THE_TOP[2]))
    return [
        code("from helpers import data, figures, model, runs\n\nfigures.use_style()"),
        parameters,
        code("settings = runs.check_parameters(globals())"),
        load,
        *earlier_cells(runs.lineage(run)[:-1], run),
    ]


def undeclared() -> list[str]:
    """The lines of the parameters that only presets give, from that of the notebooks' defaults."""
    preset = runs.PRESETS / f"{runs.Settings().preset}.yaml"
    lines = preset.read_text(encoding="utf-8").split("\n")
    return [line for line in lines if line.split(":")[0] in report.UNDECLARED]


def earlier_cells(before: list[runs.Run], run: runs.Run) -> list[NotebookNode]:
    """The training of the run from which the given one went on: why, and the cell with what it
    printed. Nothing where there is none.

    Raises:
        HandinError: its record holds no executed notebook, or it went on from another one itself.
    """
    if not before:
        return []
    if len(before) > 1:
        raise HandinError(f"{run.name} went on from {len(before)} runs; one can be handed in.")
    earlier, own = (dataclasses.asdict(runs.settings_of(one)) for one in (*before, run))
    others = ("preset", "seed", "run", "start_from", "basic_images")
    changed = {name: value for name, value in earlier.items() if value != own[name]}
    changed = {name: value for name, value in changed.items() if name not in others}
    return [
        new_markdown_cell(EARLIER),
        code(f"of_the_first = {pprint.pformat(changed, sort_dicts=False, compact=True)}"),
        new_markdown_cell("What the next cell prints is explained in chapter 3."),
        code(TRAIN_EARLIER, printed_by_training(before[0])),
    ]


def printed_by_training(run: runs.Run) -> str:
    """What the cell that trains has printed when a run was made."""
    cells = executed_training(run).cells
    (cell,) = (cell for cell in cells if "training.train(images" in cell.source)
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def parameter_lines(chapter: NotebookNode) -> list[str]:
    """The lines of its parameters cell."""
    return next(cell for cell in chapter.cells if is_parameters(cell)).source.split("\n")


def is_parameters(cell: NotebookNode) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def chapter_cells(chapter: NotebookNode) -> list[NotebookNode]:
    """The cells of a notebook but those that the top has, with the text that introduces them; of
    those that need the whole project, only what they gave."""
    kept: list[NotebookNode] = []
    for cell in chapter.cells:
        if cell.cell_type == "markdown":
            cell.source = as_chapter(cell.source)
        elif cell.execution_count is None:
            raise HandinError("A stored notebook has no outputs; run `make publish` first.")
        elif cell.source.startswith(AT_THE_TOP) or is_parameters(cell):
            if kept[-1].cell_type == "markdown" and not kept[-1].source.startswith("# "):
                kept.pop()
            continue
        elif any(words in cell.source for words in PROJECT_ONLY):
            cell = new_markdown_cell(what_it_gave(cell))
        kept.append(cell)
    return kept


def what_it_gave(cell: NotebookNode) -> str:
    """The outputs of a cell as text: pictures in it, tables, and what was printed."""
    given = []
    for output in cell.outputs:
        formats = output.get("data", {})
        if "image/png" in formats:
            given.append(f"![](data:image/png;base64,{formats['image/png'].replace(chr(10), '')})")
        elif "text/markdown" in formats:
            given.append(formats["text/markdown"])
        elif "text/html" in formats:
            given.append(re.sub(r"<style.*?</style>\s*", "", formats["text/html"], flags=re.S))
        else:
            given.append(f"```\n{(output.get('text') or formats['text/plain']).rstrip()}\n```")
    return "\n\n".join(["(From the project's records:)", *given])


def as_chapter(text: str) -> str:
    """The text of a notebook as that of a chapter."""
    text = re.sub(r"^# 0(\d) · ", r"# Chapter \1 · ", text)
    text = re.sub(r"\b([Nn])otebooks? 0(\d)", lambda m: f"{'Cc'[m[1] == 'n']}hapter {m[2]}", text)
    text = re.sub(r"\b([Tt]he) README\b", r"\1 project's README", text)
    return text.replace("his notebook", "his chapter")


def write() -> str:
    """Make `report/handin.zip`: one folder with the notebook and the PDF; its path, as shown.

    Raises:
        HandinError: a notebook has no outputs, or the PDF is missing.
        ReportError: a notebook stopped.
    """
    run = runs.read(report.best_run())
    pdf, target = report.NOTEBOOKS / "report.pdf", report.REPORT / "handin.zip"
    if not pdf.is_file():
        raise HandinError("notebooks/report.pdf is missing; run `make publish ONLY=04` first.")
    runs.check_same_data(run, data.load_data())
    target.parent.mkdir(exist_ok=True)
    notebook = nbformat.writes(make_notebook(make_chapters(run), run))

    def write_archive(file: IO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{FOLDER}/report.ipynb", notebook)
            archive.write(pdf, f"{FOLDER}/report.pdf")

    runs.write_aside(target, write_archive)
    return runs.place(target)


def main() -> None:
    expected = (
        HandinError, report.ReportError, data.DataError, runs.ParameterError, runs.RunError,
    )  # fmt: skip
    stopped = "Stopped from the keyboard; what was handed in before is as it was."
    with runs.ending_in_a_sentence(expected, stopped):
        print(f"{write()} is ready to be handed in.")


if __name__ == "__main__":
    main()
