"""Execute the notebooks through papermill, and clean what they leave behind."""

from __future__ import annotations

import ast
import base64
import io
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from helpers.project import ROOT, ProjectError, shown

NOTEBOOKS = ROOT / "notebooks"
REPORT = ROOT / "report"
SEQUENCE = (
    "01_data_exploration", "02_model_definition", "03_training", "04_analysis", "05_weights",
)  # fmt: skip
TRAINING, ANALYSIS = "03_training", "04_analysis"


class ReportError(ProjectError):
    """The report cannot be made."""


def execute(
    name: str, target: Path, parameters: dict[str, Any], folder: Path = NOTEBOOKS
) -> NotebookNode:
    """Execute `folder/name.ipynb`, its kernel started there as JupyterLab starts it, into `target`.

    It is given those of the `parameters` that it declares. What is returned is what `target` holds:
    without absolute paths, with small pictures.

    Raises:
        ReportError: it stopped, or its kernel did not start or died.
    """
    source, failure = folder / f"{name}.ipynb", ""
    declared = papermill.inspect_notebook(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            source,
            target,
            {key: value for key, value in parameters.items() if key in declared},
            cwd=folder,
            kernel_name="python3",
            progress_bar=False,
            coalesce_streams=True,
            stdout_file=sys.stdout if name == TRAINING else None,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # not about ports
        )
    except PapermillExecutionError as error:
        said = textwrap.shorten(f"{error.ename}: {error.evalue}".rstrip("."), 180, placeholder=" …")
        failure = f"{name} stopped in its cell [{error.exec_count}] with {said}"
    except DeadKernelError:
        failure = f"{name} stopped because its kernel died, perhaps for want of memory"
    except (NoSuchKernel, RuntimeError) as error:  # nothing was executed
        raise ReportError(
            f"{name} could not start the Jupyter kernel python3 ({str(error)[:80]}); "
            "install ipykernel, or unset JUPYTER_PREFER_ENV_PATH."
        ) from None
    notebook = with_small_pictures(portable(nbformat.read(target, as_version=4)))
    nbformat.write(notebook, target)
    if failure:
        raise ReportError(f"{failure}; what it had done is in {shown(target)}.")
    return notebook


def portable(notebook: NotebookNode) -> NotebookNode:
    """`notebook` without the paths of this machine: the project's root and the user's home."""
    text = nbformat.writes(notebook).replace(f"{ROOT}/", "")
    if Path.home().name:  # not of a user whose home is the root of all paths
        text = text.replace(f"{Path.home()}/", "~/")
    notebook = nbformat.reads(text, as_version=4)
    known = notebook.metadata.get("papermill", {})
    for key in ("input_path", "output_path"):  # the output may lie anywhere
        known[key] = Path(known.get(key) or "").name
    return notebook


def with_small_pictures(notebook: NotebookNode) -> NotebookNode:
    """`notebook` with its PNG outputs in 256 colours of their own: a third of the size, and the eye
    sees no difference at the size of a page."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            small = io.BytesIO()
            # Of Pillow's methods the one that keeps rare colours, such as of one small photograph.
            few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
            few.save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return notebook


# What stored outputs should not hold. A path begins with a folder that machines have: the "/" of a
# URL, an HTML tag or a fraction is none.
FAULTS = {
    "an absolute path": re.compile(
        r"(?<![\w.~:/<])/(?:home|root|tmp|usr|opt|var|mnt|work|content|Users|private)/\S*"
        r"|\b[A-Z]:\\\w\S*"
    ),
    "a warning": re.compile(r"\b\w*Warning\b|\bDEPRECAT\w*"),
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "a progress bar": re.compile(r"[█▏▎▍▌▋▊▉]|\d+%\||\bit/s\b"),
}


def faults(notebook: NotebookNode) -> list[str]:
    """What the outputs of `notebook` hold that stored outputs should not, each with its cell."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts = [output.get("text", ""), *output.get("traceback", [])]
            texts += [value for kind, value in output.get("data", {}).items() if "text" in kind]
            for fault, pattern in FAULTS.items():
                if match := pattern.search("\n".join(texts)):
                    found.append(f"{fault} in cell [{cell.execution_count}]: {match[0][:60]}")
            if output.output_type == "error":
                found.append(f"an error in cell [{cell.execution_count}]: {output.ename}")
    return found


def check_outputs(name: str, notebook: NotebookNode) -> None:
    """Raise a ReportError if outputs hold what stored outputs should not."""
    if found := faults(notebook):
        raise ReportError(f"{name} is not stored, for its outputs hold {'; '.join(found)[:180]}.")


def store_outputs(name: str, executed: NotebookNode) -> None:
    """Put the outputs of an executed notebook into the one in `notebooks/`, cell by cell."""
    check_outputs(name, executed)
    source = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(source, as_version=4)
    for cell, done in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    nbformat.write(notebook, source)


def submitted() -> str:
    """The name of the run that is handed in: the one that notebook 04 analyses unless told."""
    declared = papermill.inspect_notebook(NOTEBOOKS / f"{ANALYSIS}.ipynb")
    return ast.literal_eval(declared["run"]["default"])
