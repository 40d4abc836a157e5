"""The notebooks: their shape, their stored outputs, and that they run in each documented way."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from helpers import project, settings
from helpers.report.execute import SEQUENCE
from helpers.settings import Settings

# What stored outputs do not hold: absolute paths (not URLs or fractions), warnings, tracebacks and
# progress bars.
FAULT = re.compile(
    r"(?<![\w.~:/<])/(?:home|root|tmp|usr|opt|var|mnt|work|content|Users|private)/|\b[A-Z]:\\\w"
    r"|Warning\b|\bDEPRECAT|Traceback \(most recent|[█▏▎▍▌▋▊▉]|\d%\||\bit/s\b"
)
SMOKE = settings.read_preset("smoke") | {"train_images": 500, "test_images": 500, "device": "cpu"}


def read(name: str) -> NotebookNode:
    return nbformat.read(project.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", SEQUENCE)
def test_notebooks_are_made_for_reading(name: str) -> None:
    cells = read(name).cells
    sources = [cell.source for cell in cells]  # the hand-in relies on the first six
    assert cells[0].cell_type == "markdown" and "\n\nimport " in sources[1]
    assert "tags" in cells[3].metadata and "check_parameters(" in sources[5]
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = ["parameters" in cell.metadata.get("tags", []) for cell in code]
    assert len(cells) <= 45
    assert tagged.count(True) == 1
    story = code[tagged.index(True) + 1 :]
    assert max(len(cell.source.splitlines()) for cell in story) <= 20
    before = [one.cell_type == "markdown" for one, cell in pairwise(cells)
              if cell.cell_type == "code"]  # fmt: skip
    assert sum(before) >= 0.8 * len(before)
    for cell in story:
        tree = ast.parse("\n".join(l for l in cell.source.splitlines() if l[:1] not in "%!"))
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        assigned = set(settings.assigned(cell.source))
        assert not assigned & set(Settings.model_fields), "it would be taken for a parameter"


@pytest.mark.parametrize("name", [*SEQUENCE, "../handin/report"])
def test_stored_outputs_are_whole_and_clean(name: str) -> None:
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    for output in outputs:
        kinds = output.get("data", {})
        texts = [output.get("text", ""), *(kinds[kind] for kind in kinds if "text" in kind)]
        assert output.output_type != "error" and not FAULT.search("\n".join(texts))
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.fixture(scope="module")
def smoke_project(copy_project: Callable[[], Path]) -> Path:
    """A copy of the project whose notebooks have the parameters of a small run."""
    folder = copy_project()
    for name in SEQUENCE:
        path = folder / "notebooks" / f"{name}.ipynb"
        notebook = load_notebook_node(str(path))
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        declared = set(settings.assigned(cell.source))
        given = {key: value for key, value in SMOKE.items() if key in declared}
        notebook = parameterize_notebook(notebook, given | {"run": "smoke"})
        for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
            cell.execution_count = number + 1
        nbformat.write(notebook, path)
    return folder


def test_all_notebooks_run_under_nbval(smoke_project: Path) -> None:
    """Outputs of cells tagged nbval-check-output are compared with the stored ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0",
               "--nbval-lax", "--nbval-cell-timeout=600", "notebooks"]  # fmt: skip
    if not os.environ.get("CIFAR10_ROOT"):  # on the stand-in nothing is as stored: it has to run
        for path in (smoke_project / "notebooks").glob("*.ipynb"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("nbval-check-output", "not-compared"), encoding="utf-8")
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=smoke_project, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:]
    # By the helpers beside the notebooks, whichever are installed.
    assert (smoke_project / "notebooks" / "runs" / "smoke" / "metrics.json").is_file()


def papermill(project_folder: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """In a foreign folder, with what has spoilt it before: another backend, another locale."""
    environment = os.environ | {
        "PYTHONPATH": str(project_folder), "MPLBACKEND": "Agg", "LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8",
        errors="replace", timeout=900,
    )  # fmt: skip


def test_papermill_runs_03_then_04_from_a_foreign_folder(
    copy_project: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copy_project()
    notebooks, preset = folder / "notebooks", folder / "notebooks" / "parameters" / "smoke.yaml"
    done = papermill(
        folder, tmp_path, str(notebooks / "03_training.ipynb"), "03.ipynb", "-f", str(preset),
        "-p", "train_images", "500", "-p", "test_images", "500", "-r", "run", "mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unknown parameter" not in done.stderr
    done = papermill(
        folder, tmp_path, str(notebooks / "04_analysis.ipynb"), "04.ipynb", "-r", "run", "mine"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("03", "04"):
        notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
        assert not any("\r" in o.get("text", "") for o in outputs)  # nothing of the progress line


def test_the_notebooks_need_nothing_that_makes_reports() -> None:
    code = """import sys; sys.modules |= dict.fromkeys(["typst", "papermill", "nbconvert"])
from helpers import data, evaluation, figures, runs, study, training
study.table("a"), study.ladder(), runs.history()"""
    subprocess.run([sys.executable, "-c", code], cwd=project.ROOT, check=True)


def test_a_wrong_parameter_ends_papermill_in_one_sentence(
    copy_project: Callable[[], Path], tmp_path: Path
) -> None:
    folder = copy_project()
    source = str(folder / "notebooks" / "03_training.ipynb")
    done = papermill(folder, tmp_path, source, "out.ipynb", "-p", "epoch", "3")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ParameterError: Parameter epoch is")
    assert not list((folder / "notebooks" / "runs").glob("small*"))
