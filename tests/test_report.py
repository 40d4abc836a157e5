"""The report's own work, tried on small notebooks that need no data and no training."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers import data, model, report, runs

KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def notebook_of(*cells: str, parameters: str = "seed = 0") -> nbformat.NotebookNode:
    """A notebook: a heading, a parameters cell, and code cells."""
    head = new_code_cell(parameters, metadata={"tags": ["parameters"]})
    codes = [new_code_cell(cell) for cell in cells]
    return new_notebook(cells=[new_markdown_cell("# A title"), head, *codes], metadata=KERNEL)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with five small notebooks and one preset, in which the report works."""
    notebooks = tmp_path / "notebooks"
    (notebooks / "parameters").mkdir(parents=True)
    (notebooks / "parameters" / "small.yaml").write_text("preset: small\nepochs: 4\n")
    for name in report.SEQUENCE:
        nbformat.write(notebook_of("print(seed)"), notebooks / f"{name}.ipynb")
    for module in (data, runs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(report, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(report, "REPORT", tmp_path / "report")
    monkeypatch.setattr(runs, "RUNS", notebooks / "runs")
    monkeypatch.setattr(runs, "PRESETS", notebooks / "parameters")
    return tmp_path


def use_dataset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_data", lambda: data.ImageData(name, None, None))


# ---- the command


def test_unknown_preset_is_told_the_presets(project: Path) -> None:
    with pytest.raises(SystemExit, match="no preset 'fast'; choose from small"):
        report.main(["--preset", "fast"])


@pytest.mark.parametrize(
    ("line", "named"), [("momentun: 0.9", "momentun"), ("learning_rate: 1e-3", "learning_rate")]
)
def test_preset_with_a_wrong_parameter_stops_before_the_first_notebook(
    project: Path, line: str, named: str
) -> None:
    preset = project / "notebooks" / "parameters" / "small.yaml"
    preset.write_text(preset.read_text() + line + "\n")
    with pytest.raises(SystemExit, match=rf"small\.yaml cannot be used.*{named}"):
        report.main(["--preset", "small"])
    assert not (project / "report").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [("", "holds no parameters"), ("- 1\n", "holds no parameters"), ("a: [1,\nb", "is no YAML")],
)
def test_a_preset_that_holds_nothing_is_told_so(project: Path, content: str, fault: str) -> None:
    (project / "notebooks" / "parameters" / "small.yaml").write_text(content)
    with pytest.raises(SystemExit, match=rf"small\.yaml {fault}.*; write lines like epochs: 6"):
        report.main(["--preset", "small"])


def test_a_folder_that_cannot_be_written_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_dataset("cifar10", monkeypatch)
    report.REPORT.touch()
    with pytest.raises(SystemExit, match=r"^report/small cannot be written or read: Not a dir"):
        report.main(["--preset", "small"])


def test_nothing_of_an_earlier_report_is_taken_for_new(project: Path) -> None:
    (folder := project / "report" / "small").mkdir(parents=True)
    for name in ("index.html", "04_analysis.ipynb", "explorer.html", "report.pdf"):
        (folder / name).touch()
    (folder / "03_training_wide-blocks.ipynb").touch()  # made just before
    report.remove_pages(folder)
    assert [path.name for path in folder.iterdir()] == ["03_training_wide-blocks.ipynb"]


def test_a_report_that_was_stopped_after_its_training_does_not_train_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = project / "report" / "small", runs.Settings(preset="small", epochs=4)
    images = data.ImageData("cifar10", None, None)
    made = runs.Run(
        "small-seed0-2", folder, {}, pd.DataFrame(), pd.DataFrame(), {"dataset": "cifar10"}
    )
    monkeypatch.setattr(runs, "names", lambda: [made.name])
    monkeypatch.setattr(runs, "read", lambda name: made)
    of_run = dataclasses.replace(settings, run=made.name)
    monkeypatch.setattr(runs, "settings_of", lambda run: of_run)
    assert report.trained_before(folder, settings, images) == ""
    folder.mkdir(parents=True)
    notebook = new_notebook(metadata={"papermill": {"parameters": {"run": made.name}}})
    nbformat.write(notebook, folder / "03_training.ipynb")
    assert report.trained_before(folder, settings, images) == ""  # stopped while it was executed
    (folder / "03_training.html").touch()
    assert report.trained_before(folder, settings, images) == made.name
    assert report.trained_before(folder, dataclasses.replace(settings, epochs=5), images) == ""
    drawn = data.ImageData("stand-in", None, None)
    assert report.trained_before(folder, settings, drawn) == "", "that one saw other images"
    (folder / "index.html").touch()
    assert report.trained_before(folder, settings, images) == "", "that one was finished"


def test_an_unfinished_run_goes_on_from_the_run_with_which_it_began(project: Path) -> None:
    assert report.begun_from("small-seed1") == ""
    (runs.RUNS / "small-seed1").mkdir(parents=True)
    runs.write_json(runs.RUNS / "small-seed1" / "config.json", {"start_from": "first-seed1-2"})
    assert report.begun_from("small-seed1") == "first-seed1-2"


def test_a_wrong_seed_is_told_before_anything_is_removed(project: Path) -> None:
    (project / "report" / "small").mkdir(parents=True)
    page = project / "report" / "small" / "index.html"
    page.touch()
    with pytest.raises(SystemExit, match="Parameter seed = -1"):
        report.main(["--preset", "small", "--seed", "-1"])
    assert page.exists()


def test_a_report_that_is_being_made_keeps_its_pages(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_dataset("cifar10", monkeypatch)
    (project / "report" / "small").mkdir(parents=True)
    page = project / "report" / "small" / "01_data_exploration.html"
    page.touch()
    settings = runs.settings_from(runs.read_preset("small") | {"run": "small-seed0"})
    stopped = pytest.raises(SystemExit, match="small-seed0 is under way in another process")
    with runs.Record(settings, data.load_data()), stopped:
        report.main(["--preset", "small"])
    assert page.exists()


def test_only_needs_publish(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        report.main(["--only", "01"])
    assert "--only goes with --publish" in capsys.readouterr().err


def test_the_notebook_that_stops_is_named_and_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_dataset("cifar10", monkeypatch)
    stopping = notebook_of("print('so far')", "1 / 0", "print('never')")
    nbformat.write(stopping, project / "notebooks" / "01_data_exploration.ipynb")
    with pytest.raises(SystemExit) as stop:
        report.main(["--preset", "small"])
    sentence = str(stop.value)
    assert "01_data_exploration stopped at its cell [" in sentence
    assert "ZeroDivisionError" in sentence
    kept = project / "report" / "small" / "01_data_exploration.ipynb"
    assert str(kept.relative_to(project)) in sentence
    assert "so far" in kept.read_text()


# ---- executing


def test_a_run_to_go_on_from_is_made_first_unless_its_weights_are_here(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preset `b` begins with the runs of preset `a`; of that one's seed 1 there are two. Preset `c`
    begins with those of `b`."""
    start_of = {"a": "", "b": "a", "c": "b"}
    monkeypatch.setattr(runs, "presets", lambda: ["a", "b", "c"])
    monkeypatch.setattr(
        runs, "read_preset", lambda name: {"preset": name, "start_from": start_of[name]}
    )
    executed = []
    monkeypatch.setattr(
        report, "execute", lambda *given: executed.append(given) or (nbformat.v4.new_notebook(), 1)
    )
    for name in ("a-seed0", "a-seed1", "a-seed1-2"):
        (runs.RUNS / name).mkdir(parents=True)
        (runs.RUNS / name / "metrics.json").write_text("{}")
    (runs.RUNS / "a-seed1-2" / "weights.pt").touch()
    for name in ("a-seed0-2", "a-seed2", "b-seed2", "b-seed3"):
        (runs.RUNS / name).mkdir()  # under way

    def begin(start: str, seed: int) -> str:
        settings = runs.Settings(preset="b", seed=seed, start_from=start)
        return report.earlier_run(settings, project / "report")

    assert begin("", 1) == "" and begin("some-run", 1) == "some-run"
    assert begin("a", 1) == "a-seed1-2" and not executed
    assert begin("a", 0) == "a-seed0-2"
    ((name, _, parameters),) = executed
    assert name == report.TRAINING
    assert parameters == {"preset": "a", "seed": 0, "run": "a-seed0-2", "start_from": ""}
    assert (runs.RUNS / "a-seed0-2" / "03_training.ipynb").is_file()
    assert begin("b", 2) == "b-seed2"
    assert [given[2]["run"] for given in executed[1:]] == ["a-seed2", "b-seed2"]
    assert executed[-1][2]["start_from"] == "a-seed2"
    runs.write_json(runs.RUNS / "b-seed3" / "config.json", {"start_from": "a-seed1"})
    assert begin("b", 3) == "b-seed3"
    assert executed[-1][2]["start_from"] == "a-seed1", "one that is under way goes on"


def test_a_notebook_that_papermill_wrote_elsewhere_keeps_the_name_alone() -> None:
    paths = {"input_path": f"{data.ROOT}/notebooks/a.ipynb", "output_path": "/elsewhere/b.ipynb"}
    notebook = new_notebook(metadata={"papermill": {**paths, "version": "2"}})
    known = report.portable(notebook).metadata.papermill
    assert known == {"input_path": "notebooks/a.ipynb", "output_path": "b.ipynb", "version": "2"}


def test_execute_gives_declared_parameters_and_stores_no_path(
    project: Path, capfd: pytest.CaptureFixture
) -> None:
    source = project / "notebooks" / "03_training.ipynb"
    cells = "from pathlib import Path\nprint(seed, Path.cwd() / 'x')", "print('a line')\nseed + 1"
    nbformat.write(notebook_of(*cells), source)
    target = project / "03.ipynb"
    notebook, seconds = report.execute("03_training", target, {"seed": 7, "epochs": 3})
    injected, first, second = notebook.cells[2:]
    assert injected.source.splitlines()[1:] == ["seed = 7"]
    assert first.outputs[0].text == "7 notebooks/x\n"
    assert second.outputs[1].data["text/plain"] == "8"
    assert str(project) not in target.read_text()
    assert seconds > 0
    assert "a line" in capfd.readouterr().out  # of the training notebook, live


def test_plots_are_in_the_notebook_whatever_backend_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = project / "notebooks" / "01_data_exploration.ipynb"
    nbformat.write(notebook_of("import matplotlib.pyplot as plt\nplt.plot([1, 2]);"), source)
    notebook, _ = report.execute("01_data_exploration", project / "01.ipynb", {})
    assert "image/png" in notebook.cells[-1].outputs[-1].data
    assert os.environ["MPLBACKEND"] == "agg"


def test_pictures_in_outputs_are_made_small_and_look_the_same() -> None:
    """A plot in few colours to the number, photographs nearly, a small red one among many others
    as well; no other output is touched."""
    row = np.linspace(0, 255, 300).astype(np.uint8)
    photograph = np.stack(np.broadcast_arrays(row[:, None], row, row[::-1]), axis=-1)
    grain = np.random.default_rng(0).integers(8, size=photograph.shape, dtype=np.uint8)
    photograph = photograph ^ grain
    photograph[:10, :10] = (250, 20, 40)  # rare there
    plot = np.full((300, 300, 3), 255, dtype=np.uint8)
    plot[100:120, :, 0] = 30
    plot[200:] = np.random.default_rng(1).integers(150, size=(100, 300, 1))  # soft edges
    notebook = notebook_of("1")
    notebook.cells[1].outputs = [output("text")]
    for pixels in (photograph, plot):
        stored = io.BytesIO()
        Image.fromarray(pixels).save(stored, "PNG")
        encoded = {"image/png": base64.b64encode(stored.getvalue()).decode()}
        notebook.cells[1].outputs.append(new_output("display_data", data=encoded))
    sizes = [len(o.data["image/png"]) for o in notebook.cells[1].outputs[1:]]
    text, *shown = report.with_small_pictures(notebook).cells[1].outputs
    assert text == output("text")
    again = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(o.data["image/png"]))).convert("RGB"))
        for o in shown
    ]
    assert (again[1] == plot).all()
    off = np.abs(again[0].astype(int) - photograph)
    assert off.mean() < 10 and off[:10, :10].mean() < 10
    assert all(len(o.data["image/png"]) < size / 1.5 for o, size in zip(shown, sizes))


# ---- stored outputs


def output(text: str) -> nbformat.NotebookNode:
    return new_output("stream", name="stdout", text=text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("saved /home/ann/project/x.png", "an absolute path"),
        ("see '/tmp/x'", "an absolute path"),
        ("UserWarning: old", "a warning"),
        ("Traceback (most recent call last):", "a traceback"),
        (" 50%|█████     | 1/2", "a progress bar"),
    ],
)
def test_faults_of_stored_outputs_are_found(text: str, fault: str) -> None:
    notebook = notebook_of("1")
    notebook.cells[-1].outputs = [output(text)]
    assert fault in report.faults(notebook)[0]


@pytest.mark.parametrize(
    "text", ["https://example.org/home/x", "accuracy 89.0% at 3/4", "notebooks/runs/quick-seed0"]
)
def test_what_only_looks_like_a_fault_is_none(text: str) -> None:
    notebook = notebook_of("1")
    notebook.cells[-1].outputs = [output(text)]
    assert report.faults(notebook) == []


def test_an_error_output_is_a_fault() -> None:
    notebook = notebook_of("1")
    notebook.cells[-1].outputs = [
        new_output("error", ename="KeyError", evalue="x", traceback=["KeyError: x"])
    ]
    assert "KeyError" in report.faults(notebook)[0]


def test_publish_stores_outputs_and_nothing_else(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_dataset("cifar10", monkeypatch)
    path = project / "notebooks" / "02_model_definition.ipynb"
    others = [project / "notebooks" / f"{name}.ipynb" for name in report.SEQUENCE if name[1] != "2"]
    before = nbformat.read(path, as_version=4)
    untouched = [other.read_bytes() for other in others]
    report.main(["--publish", "--only", "02"])
    after = nbformat.read(path, as_version=4)
    assert after.cells[-1].outputs[0].text == "0\n"
    assert [cell.execution_count for cell in after.cells[1:]] == [1, 2]
    for cell in after.cells[1:]:
        cell.outputs, cell.execution_count = [], None
    assert after == before
    assert [other.read_bytes() for other in others] == untouched


def test_publish_refuses_faults_and_leaves_the_notebook(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_dataset("cifar10", monkeypatch)
    path = project / "notebooks" / "01_data_exploration.ipynb"
    nbformat.write(notebook_of("import warnings\nwarnings.warn('old')"), path)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"01_data_exploration is not stored.*a warning in"):
        report.main(["--publish"])
    assert path.read_bytes() == before


def test_publish_refuses_the_stand_in(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_dataset("stand-in", monkeypatch)
    with pytest.raises(SystemExit, match="CIFAR-10"):
        report.main(["--publish"])


# ---- pages

FORMULAS = r"""# The block & its formula

With $x' = \sum_{l=1}^{L} a_l\,C_l(x)$, code `$PATH`, dollars: $5, and a [link](03_training.ipynb).

$$ m_c = \frac{1}{HW} \sum_{i,j} x_{c,i,j} $$
"""


def page(tmp_path: Path, dataset: str) -> str:
    notebook = notebook_of("1")
    notebook.cells[0].source = FORMULAS
    notebook.cells[-1].outputs = [new_output("display_data", {"text/latex": r"$\frac{a}{b}$"})]
    target = tmp_path / "page.html"
    report.render(notebook, target, dataset)
    return target.read_text(encoding="utf-8")


def loaded(html: str) -> list[str]:
    """What a browser would fetch to show the page."""
    tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"(?!data:)[^\"]*", html)
    return tags + re.findall(r"@import[^;]*|\burl\((?!['\"]?(?:data:|#))[^)]*|\bimport\(.*", html)


def test_page_needs_no_network(tmp_path: Path) -> None:
    assert loaded(page(tmp_path, "cifar10")) == []


def test_formulas_are_mathml(tmp_path: Path) -> None:
    html = page(tmp_path, "cifar10")
    assert html.count("<math ") == 3
    assert html.count('display="block"') == 1
    assert "<code>$PATH</code>" in html
    assert "dollars: $5" in html


def test_links_between_notebooks_are_links_between_pages(tmp_path: Path) -> None:
    html = page(tmp_path, "cifar10")
    assert 'href="03_training.html"' in html
    assert "03_training.ipynb" not in html


def test_stand_in_is_said_on_top_and_in_the_title(tmp_path: Path) -> None:
    html = page(tmp_path, "stand-in")
    assert re.search(r"<title>The block &amp; its formula \(stand-in data\)</title>", html)
    assert html.index(report.STAND_IN) < html.index("<h1")


def test_cifar10_has_no_banner(tmp_path: Path) -> None:
    html = page(tmp_path, "cifar10")
    assert report.STAND_IN not in html
    assert "stand-in data" not in html


def test_overview_states_what_came_out() -> None:
    metrics = {
        "dataset": "stand-in",
        "test_accuracy": 0.8912,
        "test_accuracy_tta": 0.9,
        "train_seconds": 840.0,
        "parameters": 1_234_567,
        "hardware": {"threads": 2, "processor": "A processor"},
    }
    run = runs.Run("r", Path("r"), {"epochs": 4, "start_from": ""}, None, None, metrics)
    text = report.overview(run, {"03_training": 900.0}).cells[0].source
    assert "| epochs | `4` |\n| start_from | – |" in text
    for part in ("the stand-in: 89.12%", "90.00% with it", "14.0 min", "1,234,567", "15.0 min"):
        assert part in text


# ---- the PDF


def test_pdf_has_three_pages_at_most_and_its_numbers_are_the_records(tmp_path: Path) -> None:
    run = runs.read(report.best_run())
    report.make_pdf(run, data.ROOT / "figures" / run.name, tmp_path / "{p}.svg")
    assert 2 <= len(list(tmp_path.glob("*.svg"))) <= 3
    content = report.pdf_content(run)
    assert f"{100 * run.metrics['test_accuracy']:.2f}" in str(content["seeds"])
    epochs = ", then ".join(str(one.metrics["epochs"]) for one in runs.lineage(run))
    assert ["epochs", epochs] in content["hyperparameters"]
    table = model.layer_table(runs.settings_of(run).network())
    layers = content["layers"]
    assert [layer[0] for layer in layers] == [name for name in table.index if "after" not in name]
    numbers = [int(layer[3].replace(",", "")) for layer in layers]
    assert sum(numbers) == table["parameters"].sum() == run.metrics["parameters"]


def test_pdf_keeps_to_three_pages_when_runs_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of whoever repeats the report; with very many it is longer, and still made."""
    run = runs.read(report.best_run())
    content = report.pdf_content(run)
    for times, pages in ((1, 3), (2, 3), (9, 4)):
        more = content | {rows: times * content[rows] for rows in ("seeds", "history")}
        monkeypatch.setattr(report, "pdf_content", lambda _, more=more: more)
        folder = tmp_path / str(times)
        folder.mkdir()
        report.make_pdf(run, data.ROOT / "figures" / run.name, folder / "{p}.svg")
        made = len(list(folder.glob("*.svg")))
        assert made == 3 if pages == 3 else made >= pages


def test_the_same_parameters_on_a_gpu_are_in_the_pdf_and_none_of_it_is_called_another() -> None:
    content = report.pdf_content(runs.read(report.best_run()))
    on_gpu = runs.seeds_of(runs.read("full-gpu-seed0"))
    assert "The same parameters on NVIDIA H100" in content["result"]
    assert f"n = {len(on_gpu)}." in content["result"]
    assert [row[0] for row in content["seeds"]] == ["full-seed1", *on_gpu["run"], "full-seed0"]
    assert "full-gpu," not in content["best"]


def test_a_training_on_two_machines_names_both() -> None:
    first, second = (runs.read(f"{name}-seed0") for name in ("wide-blocks", "full"))
    assert report.machines([second]) == f" on {runs.machine_of(second)}"
    both = report.machines([first, second])
    assert "124.9 on 2 CPU cores (AMD EPYC" in both
    assert ", then 111.5 on 2 CPU cores (Intel" in both


def test_parameters_of_two_trainings_stand_one_after_the_other_where_they_differ() -> None:
    assert report.in_turn([250, 250]) == "250"
    assert report.in_turn([[16] * 9 + [24] * 2, []]) == "9 × 16, 2 × 24, then none"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(1, 6)], "all images as they are, after each epoch"),
        ([(4, 12)], "all images as they are, after every 4 epochs"),
        ([(30, 30)], "all images as they are, at the end"),
        ([(40, 40), (30, 30)], "all images as they are, at the end of each training"),
    ],
)
def test_the_pdf_says_when_training_images_were_measured(
    parts: list[tuple[int, int]], said: str
) -> None:
    given = [{"measure_training_every": every, "epochs": epochs} for every, epochs in parts]
    seldom = [pd.DataFrame({"training_accuracy": [None, 0.9]})] * len(parts)
    assert report.when_measured(given, seldom) == said


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(1, 6)], "all images as they are, after each epoch"),
        (
            [(40, 40), (30, 30)],
            "images as they are, all at the end of each training and 10,000 after the other epochs",
        ),
    ],
)
def test_the_pdf_says_how_many_training_images_were_measured(
    parts: list[tuple[int, int]], said: str
) -> None:
    given = [{"measure_training_every": every, "epochs": epochs} for every, epochs in parts]
    always = [pd.DataFrame({"training_accuracy": [0.8, 0.9]})] * len(parts)
    assert report.when_measured(given, always) == said


def test_trainings_that_ended_higher_than_the_result_are_named() -> None:
    made = pd.DataFrame({"run": ["low", "mine", "high"], "accuracy": [0.8, 0.9, 0.91]})
    made = made.assign(deviation=0.001, minutes=3.0, minutes_deviation=float("nan"), n=1, kind="a")
    best, other = (runs.read(f"{name}-seed0") for name in (report.BEST, "quick"))
    assert report.not_chosen(best, 0.91, made) == ""
    said = report.not_chosen(best, 0.9, made)
    assert said.endswith("ended high, 91.00 ± 0.10 % after 3.0 minutes on a (n = 1).")
    assert report.not_chosen(other, 0.9, made) == "", "nobody chose that one"


def test_the_pdf_names_the_best_run_beside_the_one_it_shows() -> None:
    run = runs.read(report.best_run())
    everywhere = runs.seeds_anywhere(run)
    best = everywhere.loc[everywhere["test_accuracy"].idxmax()]
    assert best["run"] != run.name
    own = f"The network shown here reaches {run.metrics['test_accuracy']:.2%}, and "
    said = report.best_of(run, everywhere)
    assert said.startswith(own)
    assert f"The best of all {len(everywhere)} runs, {best['run']}, reaches" in said
    alone = everywhere[everywhere["run"] == run.name]
    assert report.best_of(run, alone).endswith("six views).")
    itself = report.best_of(runs.read(best["run"]), everywhere)
    assert itself.endswith("No other run reaches more.")


def test_pdf_without_figures_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match=r"02_block\.svg is missing"):
        report.make_pdf(runs.read("quick-seed0"), tmp_path, tmp_path / "report.pdf")
