"""The hand-in is two files, and its notebook runs where nothing of the project is."""

from __future__ import annotations

import ast
import copy
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import data, handin, report, runs, training

# Run by every Python that finds it: forgets the project, which is installed in the environment.
FORGET = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{f}{getattr(f, '__module__', '')}"]
sys.path_hooks = [h for h in sys.path_hooks if "editable" not in getattr(h, "__module__", "")]
sys.path = [p for p in sys.path if "editable" not in p]
"""


@pytest.fixture(scope="module")
def best() -> runs.Run:
    return runs.read(report.best_run())


@pytest.fixture(scope="module")
def chapters(best: runs.Run) -> list[nbformat.NotebookNode]:
    """As `handin.make_chapters` gives them, but the first two with their stored outputs."""
    given = {}

    def execute(name: str, target: Path, parameters: dict) -> tuple[nbformat.NotebookNode, float]:
        given[name], executed = parameters, stored(name)
        injected = nbformat.v4.new_code_cell("# Parameters")
        injected.metadata["tags"] = ["injected-parameters"]
        executed.cells.insert(5, injected)
        return executed, 0.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "execute", execute)
        made = handin.make_chapters(best)
    assert given == dict.fromkeys(report.SEQUENCE[:2], best.config)
    return made


def stored(name: str) -> nbformat.NotebookNode:
    return nbformat.read(report.NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def notebook(chapters: list[nbformat.NotebookNode], best: runs.Run) -> nbformat.NotebookNode:
    return handin.make_notebook(copy.deepcopy(chapters), best)


def test_parameters_and_outputs_are_those_of_the_best_network(
    notebook: nbformat.NotebookNode, best: runs.Run
) -> None:
    (cell,) = (cell for cell in notebook.cells if handin.is_parameters(cell))
    given = {s.targets[0].id: ast.literal_eval(s.value) for s in ast.parse(cell.source).body}
    assert {"seed", "run", "widths", "gate", "epochs"} <= set(given)
    assert set(given) > report.UNDECLARED
    assert given == {name: runs.parameters_of(best)[name] for name in given} | {"run": ""}
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    accuracy = f"{best.metrics['test_accuracy']:.2%}"
    assert outputs.count(accuracy) >= 3 and accuracy in notebook.cells[0].source
    for part in runs.lineage(best):
        epochs = part.metrics["epochs"]
        said = len(re.findall(rf"epoch +\d+/{epochs} ", outputs))
        # What a run that was interrupted had said before is not in its last notebook.
        assert 0 < said <= epochs if part.metrics["interruptions"] else said == epochs


def test_the_first_of_two_trainings_is_made_unless_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[runs.Settings] = []
    monkeypatch.setattr(training, "train", lambda images, settings: made.append(settings))
    monkeypatch.setattr(runs, "names", lambda: [one.run for one in made])
    settings = runs.Settings(preset="two", start_from="first", epochs=30, first_sizes=[])
    names = {"settings": settings, "images": None, "runs": runs, "of_the_first": {"epochs": 40}}
    for _ in range(2):
        exec(handin.TRAIN_EARLIER, names)
    (first,) = made
    assert first == dataclasses.replace(settings, run="first", start_from="", epochs=40)
    exec(handin.TRAIN_EARLIER, names | {"settings": runs.Settings()})
    assert len(made) == 1, "a run with fresh weights needs none"


def test_a_record_without_its_notebook_is_named(tmp_path: Path, best: runs.Run) -> None:
    bare = dataclasses.replace(best, folder=tmp_path)
    with pytest.raises(handin.HandinError, match=r"03_training\.ipynb is missing"):
        handin.with_outputs_of_run(stored(report.TRAINING), bare)


def test_outputs_never_come_to_the_wrong_cells(best: runs.Run) -> None:
    notebook = stored(report.TRAINING)
    del notebook.cells[5]
    with pytest.raises(handin.HandinError, match=f"has other cells than when it made {best.name}"):
        handin.with_outputs_of_run(notebook, best)


def test_every_module_that_is_used_is_written_before() -> None:
    known: set[str] = set()
    assert handin.MODULES.index("mixing.cpp") < handin.MODULES.index("mixing.py")
    for file in (name for name in handin.MODULES if name.endswith(".py")):
        name = file.removesuffix(".py")
        tree = ast.parse((data.ROOT / "helpers" / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
                inner = node.module.split(".")[1:] or [alias.name for alias in node.names]
                assert set(inner) <= known, name
        known.add(name)


def test_the_story_is_whole_and_told_once(notebook: nbformat.NotebookNode) -> None:
    sources = [cell.source for cell in notebook.cells]
    everything = "\n".join(sources)
    assert re.findall(r"^# (.*)", "\n".join(s for s in sources if s.startswith("# ")), re.M) == [
        "CIFAR-10 with input-weighted convolution blocks",
        *("Chapter 1 · Data exploration", "Chapter 2 · Model definition"),
        *("Chapter 3 · Training", "Chapter 4 · Analysis", "Chapter 5 · The weights *a*"),
    ]
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells) == 1
    for said_once in ("settings = runs.check_parameters(", "images = data.load_data()"):
        assert sum(source.startswith(said_once) for source in sources) == 1
    for words in handin.PROJECT_ONLY:
        assert not any(words in s for s in sources if not s.startswith("%%writefile"))
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"notebook 0\d|\.ipynb\)|\]\((?!http|data:)", prose)
    # What needs the whole project is shown as it came out there.
    assert prose.count("From the project's records") >= 4 and "](data:image/png" in prose
    assert "training.train(images, settings)" in everything
    kept = sum(len(cell.get("outputs", [])) for cell in notebook.cells)
    assert kept > 60 and all(cell.source.strip() for cell in notebook.cells)


def test_prose_stands_before_code_as_in_the_notebooks(notebook: nbformat.NotebookNode) -> None:
    cells = notebook.cells
    told = [
        before.cell_type == "markdown" for before, cell in itertools.pairwise(cells)
        if cell.cell_type == "code"
    ]  # fmt: skip
    assert sum(told) > 0.9 * len(told)


def test_the_zip_holds_one_folder_with_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chapters: list[nbformat.NotebookNode]
) -> None:
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    monkeypatch.setattr(handin, "make_chapters", lambda _: copy.deepcopy(chapters))
    monkeypatch.setattr(data, "load_data", lambda: data.ImageData("stand-in", None, None))
    with pytest.raises(runs.RunError, match="was trained on cifar10, and the data here is stand"):
        handin.write()
    monkeypatch.setattr(data, "load_data", lambda: data.ImageData("cifar10", None, None))
    handin.write()
    with zipfile.ZipFile(tmp_path / "report" / "handin.zip") as archive:
        expected = [f"{handin.FOLDER}/{name}" for name in ("report.ipynb", "report.pdf")]
        assert archive.namelist() == expected
        assert archive.testzip() is None
        notebook = nbformat.reads(archive.read(expected[0]).decode(), as_version=4)
        assert len(notebook.cells) > 100
        assert archive.read(f"{handin.FOLDER}/report.pdf").startswith(b"%PDF")


def test_without_outputs_there_is_no_hand_in(
    chapters: list[nbformat.NotebookNode], best: runs.Run
) -> None:
    bare = copy.deepcopy(chapters)
    for cell in bare[3].cells:
        if cell.cell_type == "code":
            cell.execution_count = None
    with pytest.raises(handin.HandinError, match="make publish"):
        handin.make_notebook(bare, best)


def test_it_runs_in_an_empty_folder_without_the_project(
    notebook: nbformat.NotebookNode, best: runs.Run, tmp_path: Path
) -> None:
    """With the smoke preset and its own seed; what it imports is in the cells before."""
    empty, elsewhere = tmp_path / "empty", tmp_path / "elsewhere"
    for folder in (empty, elsewhere):
        folder.mkdir()
    (elsewhere / "sitecustomize.py").write_text(FORGET, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(elsewhere)}
    gone = subprocess.run(
        [sys.executable, "-c", "import helpers"], cwd=empty, env=environment, capture_output=True
    )
    assert gone.returncode and b"No module named 'helpers'" in gone.stderr
    nbformat.write(notebook, empty / "report.ipynb")
    smoke = (report.NOTEBOOKS / "parameters" / "smoke.yaml").read_text(encoding="utf-8")
    (elsewhere / "smoke.yaml").write_text(yaml.safe_dump(yaml.safe_load(smoke)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "report.ipynb", "done.ipynb", "--no-progress-bar",
         "-f", str(elsewhere / "smoke.yaml")],
        cwd=empty, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = nbformat.read(empty / "done.ipynb", as_version=4)
    run = f"smoke-seed{best.config['seed']}"
    assert any(run in str(cell.get("outputs")) for cell in made.cells)
    assert (empty / "notebooks" / "runs" / run / "metrics.json").is_file()
