"""Execute the notebooks through papermill, and store their outputs."""

from __future__ import annotations

import ast
import json
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

from helpers.project import ROOT, ProjectError, short

NOTEBOOKS = ROOT / "notebooks"
REPORT = ROOT / "report"
SEQUENCE = (
    "01_data_exploration", "02_model_definition", "03_training", "04_analysis", "05_weights",
)  # fmt: skip
TRAINING, ANALYSIS = SEQUENCE[2:4]


def execute(
    name: str, target: Path, parameters: dict[str, Any], folder: Path = NOTEBOOKS
) -> NotebookNode:
    """Execute `folder/name.ipynb`, its kernel started there as JupyterLab starts it, into `target`.
    It is given those of the `parameters` that it declares. A ProjectError says why it stopped."""
    source = folder / f"{name}.ipynb"
    declared = papermill.inspect_notebook(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        return papermill.execute_notebook(
            source,
            target,
            {key: value for key, value in parameters.items() if key in declared},
            cwd=folder,
            kernel_name="python3",
            progress_bar=False,
            coalesce_streams=True,
            stdout_file=sys.stdout if name == TRAINING else None,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # not about ports
            shutdown_kernel="immediate",  # two seconds a notebook
        )
    except PapermillExecutionError as error:
        said = textwrap.shorten(f"{error.ename}: {error.evalue}".rstrip("."), 180, placeholder=" …")
        stopped = f"at cell [{error.exec_count}]: {said}"
    except DeadKernelError:
        stopped = "because its kernel died, perhaps out of memory"
    except (NoSuchKernel, RuntimeError, json.JSONDecodeError) as error:  # no kernel
        raise ProjectError(
            f"{name} could not start the Jupyter kernel python3 ({str(error)[:80]}); "
            "install ipykernel, or unset JUPYTER_PREFER_ENV_PATH."
        ) from None
    except OSError as error:  # papermill names no file
        error.filename = error.filename or str(target)
        raise
    raise ProjectError(f"{name} stopped {stopped}; what it had done is in {short(target)}.")


def store_outputs(name: str, executed: NotebookNode) -> None:
    """Put the outputs of an executed notebook into the one in `notebooks/`, cell by cell."""
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
