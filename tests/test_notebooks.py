"""The notebooks: their shape, their stored outputs, and the three ways in which they are run."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from conftest import NO_NETWORK
from nbformat import NotebookNode
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

import helpers
from helpers import evaluation, report, runs
from helpers.data import ROOT

NOTEBOOKS = ROOT / "notebooks"
# As helpers/__init__.py states it: the order in which an image travels.
ORDER = re.findall(r"\w+(?=\s*→)|(?<=→)\s*\w+", helpers.__doc__)
ORDER = tuple(dict.fromkeys(module.strip() for module in ORDER))
# The smoke preset's ways on a network that trains in seconds.
TINY = {
    "train_images": 500, "basic_images": 200, "batch_size": 100, "epochs": 1, "first_sizes": [],
    "widths": [8] * 6, "stem_filters": 12,
}  # fmt: skip

each_notebook = pytest.mark.parametrize("name", report.SEQUENCE)


def read(name: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def read_preset(name: str) -> dict:
    return yaml.safe_load((NOTEBOOKS / "parameters" / f"{name}.yaml").read_text(encoding="utf-8"))


# ---- shape


def test_the_folder_holds_the_sequence() -> None:
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == list(report.SEQUENCE)


@each_notebook
def test_notebook_is_valid_and_begins_with_its_title(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith(f"# {name[:2]} · ")
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata


def test_setup_is_the_same_everywhere() -> None:
    assert len({code_cells(read(name))[0].source for name in report.SEQUENCE}) == 1


@each_notebook
def test_prose_stands_before_code(name: str) -> None:
    cells = read(name).cells
    kinds = [cell.cell_type for cell in cells]
    explained = [kinds[i - 1] == "markdown" for i, kind in enumerate(kinds) if kind == "code"]
    assert sum(explained) >= 0.9 * len(explained), f"{explained.count(False)} without prose"


@each_notebook
def test_cells_are_short_and_define_no_long_functions(name: str) -> None:
    for cell in code_cells(read(name)):
        assert len(cell.source.splitlines()) <= 30, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 6, f"{node.name} belongs in helpers"
            assert not isinstance(node, ast.ClassDef), "classes belong in helpers"


@each_notebook
def test_sources_hold_no_absolute_path(name: str) -> None:
    for cell in read(name).cells:
        assert not report.FAULTS["an absolute path"].search(cell.source), cell.source


def test_no_notebook_says_where_papermill_wrote_it() -> None:
    for path in NOTEBOOKS.rglob("*.ipynb"):
        metadata = json.dumps(nbformat.read(path, as_version=4).metadata)
        assert not report.FAULTS["an absolute path"].search(metadata.replace('"', "'")), path


@each_notebook
def test_formulas_can_be_shown_offline(name: str, tmp_path: Path) -> None:
    report.render(read(name), tmp_path / "page.html", "cifar10")
    formulas = re.findall(r"<math .*?</math>", (tmp_path / "page.html").read_text("utf-8"), re.S)
    for formula in formulas:
        assert "\\" not in formula, f"a command that is not converted: {formula}"


# ---- parameters


def declared_in(name: str) -> dict:
    """The parameters of a notebook and their defaults."""
    (cell,) = tagged(read(name), "parameters")
    statements = ast.parse(cell.source).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in statements}


@each_notebook
def test_default_parameters_are_the_quick_preset_but_the_best_network_is_analysed(
    name: str,
) -> None:
    expected = dataclasses.asdict(runs.Settings()) | read_preset("quick")
    if name in ("04_analysis", "05_weights"):
        expected |= {"preset": report.BEST, "seed": report.BEST_SEED}
    declared = declared_in(name)
    assert declared == {key: expected[key] for key in declared}


def test_every_parameter_is_declared_somewhere() -> None:
    """But for those that are left to the presets, for a cell of at most 30 lines."""
    known = {field.name for field in dataclasses.fields(runs.Settings)}
    assert set().union(*map(declared_in, report.SEQUENCE)) == known - report.UNDECLARED
    assert set(read_preset("quick")) == known - {"seed", "run"}


@pytest.mark.parametrize("preset", runs.presets())
def test_presets_can_be_used(preset: str) -> None:
    parameters = read_preset(preset)
    assert runs.Settings(**parameters).preset == preset


# ---- stored outputs


@each_notebook
def test_stored_outputs_are_clean(name: str) -> None:
    notebook = read(name)
    assert report.faults(notebook) == []
    for cell in code_cells(notebook):
        assert cell.execution_count or not cell.outputs, "outputs without an execution count"
        assert not {"papermill", "execution"} & set(cell.metadata), "timings are no output"


@each_notebook
def test_notebook_is_small(name: str) -> None:
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size <= 500_000


# ---- the three ways: JupyterLab's (nbval), the report's, papermill's


def output_of(process: subprocess.CompletedProcess) -> str:
    return f"{process.stdout[-6000:]}\n{process.stderr[-3000:]}"


def test_the_figures_of_a_report_have_one_folder() -> None:
    """Also those of the notebooks that train nothing, where the preset's name was taken."""
    parameters = read_preset("smoke") | {"seed": 0, "run": "smoke-seed0-2"}
    for name in report.SEQUENCE:
        given = {key: value for key, value in parameters.items() if key in declared_in(name)}
        drawn = runs.label(runs.settings_from(given), SimpleNamespace(name="cifar10"))
        assert drawn == "smoke-seed0-2", name


def test_nbval_in_jupyterlabs_folder(
    copy_project: Callable[[], Path], run_python: Callable[..., subprocess.CompletedProcess]
) -> None:
    """All cells run with the smoke preset, each kernel in the notebook's own folder; cells tagged
    nbval-check-output give what is stored."""
    project = copy_project()
    for name in report.SEQUENCE:
        notebook = load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
        parameters = read_preset("smoke") | {"run": "smoke"}
        if name == report.TRAINING:  # of a small network; notebook 02 checks what it shows of quick
            parameters |= TINY
            for cell in tagged(notebook, "nbval-check-output"):
                cell.metadata.tags.remove("nbval-check-output")
        given = {key: value for key, value in parameters.items() if key in declared_in(name)}
        notebook = parameterize_notebook(notebook, given)
        (injected,) = tagged(notebook, "injected-parameters")
        check = nbformat.v4.new_code_cell(f"assert str(data.ROOT) == {str(project)!r}")
        notebook.cells.insert(notebook.cells.index(injected), check)
        nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")
    paths = [f"notebooks/{name}.ipynb" for name in report.SEQUENCE]
    options = ["--nbval-lax", "-x", "--nbval-cell-timeout=600", "--nbval-current-env"]
    process = run_python(
        "-m", "pytest", *options, "-p", "no:cacheprovider", *paths, project=project, cwd=project
    )
    assert process.returncode == 0, output_of(process)


@pytest.fixture(scope="module")
def tiny_project(copy_project: Callable[[], Path]) -> Path:
    """A copy of the project whose smoke preset takes seconds."""
    project = copy_project()
    preset = project / "notebooks" / "parameters" / "smoke.yaml"
    preset.write_text(yaml.safe_dump(read_preset("smoke") | TINY), encoding="utf-8")
    module = project / "helpers" / "data.py"  # where CIFAR-10 is not, a smaller stand-in will do
    source = module.read_text(encoding="utf-8")
    many = "training: int = TRAINING_IMAGES, test: int = TEST_IMAGES"
    assert many in source
    fewer = "training: int = 12_000, test: int = 2_000"
    module.write_text(source.replace(many, fewer), encoding="utf-8")
    return project


def test_whole_report_without_data_and_network(
    tiny_project: Path,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess],
) -> None:
    process = run_python(
        *("-m", "helpers.report", "--preset", "smoke", "--seed", "1"),
        project=tiny_project,
        cwd=tiny_project,
        CIFAR10_ROOT=str(tmp_path),
        **NO_NETWORK,
    )
    assert process.returncode == 0, output_of(process)
    for name in report.SEQUENCE:
        assert re.search(rf"^{name} +[\d.]+ (s|min)$", process.stdout, re.M), process.stdout
    for name in ("index", *report.SEQUENCE):
        html = (tiny_project / "report" / "smoke" / f"{name}.html").read_text(encoding="utf-8")
        assert report.STAND_IN in html, name
        assert "(stand-in data)</title>" in html, name
    for name in report.SEQUENCE:
        made = nbformat.read(tiny_project / "report" / "smoke" / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in code_cells(made) for output in cell.outputs]
        said = "".join(text for output in outputs for text in report.texts(output))
        assert f"{100 * evaluation.PUBLISHED:.2f}" not in said, "nothing stands beside the stand-in"
    run = tiny_project / "notebooks" / "runs" / "smoke-seed1"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["dataset"] == "stand-in"
    assert metrics["preset"] == "smoke"
    assert metrics["seed"] == 1
    assert not list(tmp_path.glob("**/*.tar.gz"))

    training = nbformat.read(run / "03_training.ipynb", as_version=4)
    assert report.faults(training) == []
    for cell in code_cells(training):
        streams = [out.name for out in cell.outputs if out.output_type == "stream"]
        assert len(streams) == len(set(streams)), "an output for each line"


def papermill(notebook: Path, folder: Path, *options: str) -> list[str]:
    """The command of the README, from a folder that is not the project's."""
    presets = notebook.parent / "parameters"
    target = folder / "out.ipynb"
    given = ["-f", str(presets / "smoke.yaml"), *options, "--no-progress-bar"]
    return ["-m", "papermill", str(notebook), str(target), *given]


def test_papermill_and_nbconvert_give_the_same_bits(
    tiny_project: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess]
) -> None:
    """papermill from a folder that is not the project's; nbconvert starts the kernel where
    JupyterLab does, in the notebook's own."""
    notebook = tiny_project / "notebooks" / "03_training.ipynb"
    command = papermill(notebook, tmp_path, "-p", "seed", "3", "-p", "run", "from-afar")
    process = run_python(*command, project=tiny_project, cwd=tmp_path)
    assert process.returncode == 0, output_of(process)
    records = tiny_project / "notebooks" / "runs"
    settings = json.loads((records / "from-afar" / "config.json").read_text(encoding="utf-8"))
    assert settings["seed"] == 3
    assert settings["train_images"] == TINY["train_images"]

    given = {k: v for k, v in settings.items() if k in declared_in("03_training")}
    parameters = parameterize_notebook(load_notebook_node(str(notebook)), given | {"run": "near"})
    edited = tiny_project / "notebooks" / "edited.ipynb"
    nbformat.write(parameters, edited)
    command = ["-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(edited)]
    process = run_python(*command, project=tiny_project, cwd=tmp_path)
    edited.unlink()
    assert process.returncode == 0, output_of(process)
    folders = [records / run for run in ("from-afar", "near")]
    losses = [(folder / "batches.csv").read_bytes() for folder in folders]
    assert losses[0] == losses[1]
    far, near = (torch.load(folder / "weights.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(far[name], near[name]) for name in far | near)


def test_a_run_that_goes_on_from_another_is_shown_with_it(
    tiny_project: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess]
) -> None:
    """As the runs of the preset `full` do."""
    training, analysis = (
        tiny_project / "notebooks" / f"{name}.ipynb" for name in ("03_training", "04_analysis")
    )
    for notebook, *options in (
        (training, "-p", "run", "first"),
        (training, "-p", "run", "later", "-p", "start_from", "first"),
        (analysis, "-p", "run", "later"),
    ):
        command = papermill(notebook, tmp_path, *options)
        process = run_python(*command, project=tiny_project, cwd=tmp_path)
        assert process.returncode == 0, output_of(process)
    shown = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    said = "".join(
        text for cell in code_cells(shown) for out in cell.outputs for text in report.texts(out)
    )
    assert "1 epochs (first), then 1 epochs (later)" in said


@pytest.mark.parametrize(
    ("notebook", "name", "value"),
    [
        ("02_model_definition", "branchs", "3"),
        ("03_training", "epochs", "many"),
    ],
)
def test_papermill_stops_at_a_wrong_parameter(
    tiny_project: Path,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess],
    notebook: str,
    name: str,
    value: str,
) -> None:
    path = tiny_project / "notebooks" / f"{notebook}.ipynb"
    command = papermill(path, tmp_path, "-p", name, value)
    before = set((path.parent / "runs").iterdir())
    process = run_python(*command, project=tiny_project, cwd=tmp_path)
    assert process.returncode != 0
    assert f"Parameter {name} " in process.stderr
    assert set((path.parent / "runs").iterdir()) == before


def test_the_analysis_refuses_a_run_that_is_not_finished_by_name(
    tiny_project: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess]
) -> None:
    (tiny_project / "notebooks" / "runs" / "begun").mkdir()
    command = papermill(
        tiny_project / "notebooks" / "04_analysis.ipynb", tmp_path, "-p", "run", "begun"
    )
    process = run_python(*command, project=tiny_project, cwd=tmp_path)
    assert process.returncode != 0
    assert "Run begun is not finished" in process.stderr


# ---- what imports what


def imports(tree: ast.AST) -> set[str]:
    """The modules that a source imports, helpers as `helpers.<module>`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "helpers":
            found |= {f"helpers.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_helpers_are_those_of_the_order() -> None:
    modules = {path.stem for path in (ROOT / "helpers").glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module: str) -> None:
    """A module imports only those before it."""
    tree = ast.parse((ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8"))
    imported = {name.split(".")[1] for name in imports(tree) if name.startswith("helpers.")}
    assert imported <= set(ORDER[: ORDER.index(module)])


def test_requirements_list_what_is_imported() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    listed = {re.split("==", line)[0].lower() for line in lines if "==" in line}
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("helpers", "tests")
        for path in (ROOT / folder).glob("*.py")
    ]
    sources += ["\n".join(c.source for c in code_cells(read(name))) for name in report.SEQUENCE]
    top = {name.split(".")[0] for source in sources for name in imports(ast.parse(source))}
    ours = {"helpers"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    distributions = packages_distributions()
    for name in top - ours - set(sys.stdlib_module_names):
        assert {found.lower() for found in distributions[name]} & listed, f"{name} is not listed"
    assert lines[-1] == "-e ."


def test_the_tests_run_with_the_versions_that_are_listed() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for name, wanted in (line.split("==") for line in lines if "==" in line):
        assert version(name).split("+")[0] == wanted, f"{name} is another version"
