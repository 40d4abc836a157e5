"""The report's pages, PDF, hand-in and commands, tried on small notebooks and a tiny run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import typst
from filelock import FileLock
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from torchvision.transforms import v2

from helpers import data, evaluation, runs, study
from helpers.project import ROOT, ProjectError
from helpers.report import __main__ as report
from helpers.report import bench, execute, handin, pages, pdf
from helpers.settings import Settings

Make = Callable[..., runs.Run]
BLOCK = {"channels": 8, "kernels": [3, 1], "pool": True}
TEXT = "# A title\n\n$a_l$, `$PATH`\n\n$$ \\frac{1}{2} $$"
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def notebook_of(*cells: str) -> nbformat.NotebookNode:
    """A heading, a parameters cell, and code cells."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    head = new_code_cell("seed = 0", metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell(TEXT), head, *(new_code_cell(cell) for cell in cells)]
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def finish(records: Path) -> Make:
    """Makes the record of an untrained network with given parameters."""

    def make(**parameters: object) -> runs.Run:
        tiny = {"run": "tiny", "blocks": [BLOCK], "first_sizes": [], "epochs": 1}
        settings = Settings(**tiny | parameters)
        accuracies = {"test_accuracy": 0.1, "training_accuracy": 0.1, "validation_accuracy": None}
        row = {"epoch": 1, "size": 32, "training_accuracy_running": 0.1, "seconds": 60.0}
        machine = {"processor": "A processor", "threads": 2, "precision": "float32"}
        metrics = {
            **accuracies, "test_accuracy_tta": 0.2, "dataset": "stand-in", "parameters": 1234,
            "preset": settings.preset, "seed": 0, "epochs": 1, "train_seconds": 60.0,
            "hardware": machine, "finished": "", "versions": {},
        }  # fmt: skip
        with runs.RunWriter(settings, "stand-in") as made:
            made.add_epoch(row | accuracies, [{"epoch": 1, "batch": 1, "loss": 2.0}] * 2)
            return made.finish(settings.network(), metrics)

    return make


# ---- pages


def loaded(html: str) -> list[str]:
    """What a browser would fetch to show the page."""
    tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"(?!data:)[^\"]*", html)
    return tags + re.findall(r"@import[^;]*|\burl\((?!['\"]?(?:data:|[#$]))[^)]*", html)


@pytest.mark.parametrize("dataset", ["cifar10", "stand-in"])
def test_pages_are_offline_with_formulas(dataset: str, tmp_path: Path) -> None:
    notebook = notebook_of("1")
    notebook.cells[-1].outputs = [new_output("display_data", {"text/latex": r"$\frac{a}{b}$"})]
    pages.render(notebook, tmp_path / "page.html", dataset)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert loaded(html) == [] and html.count("<math ") == 3 and "<code>$PATH</code>" in html
    assert 'href="03_training.html"' in html
    assert (pages.STAND_IN in html) == (dataset == "stand-in")


def test_overview_and_explorer_say_what_was_found(
    finish: Make, images: data.ImageData, tmp_path: Path
) -> None:
    run = finish(gate="sigmoid")
    index = pages.write_overview(run, images, tmp_path).read_text(encoding="utf-8")
    explorer = (tmp_path / "explorer.html").read_text(encoding="utf-8")
    assert loaded(index) == loaded(explorer) == [] and pages.STAND_IN in index
    assert "10.00%" in index and "20.00%" in index and "1,234" in index
    assert '<tr class="changed"><th>gate</th>' in index and "<tr><th>activation</th>" in index
    content = json.loads(re.search(r'type="application/json">(.*?)</script>', explorer, re.S)[1])
    network = runs.load_network(run)
    logits, (a,) = (f(network, images.test) for f in (evaluation.predict, evaluation.gates))
    assert len({one["number"] for one in content["images"]}) == len(content["images"])
    for one in content["images"]:
        i = one["number"]
        pixels = v2.functional.pil_to_tensor(Image.open(urllib.request.urlopen(one["picture"])))
        assert torch.equal(pixels, images.test.images[i])
        assert (one["predicted"], one["label"]) == (logits[i].argmax(), images.test.labels[i])
        assert one["a"][0] == pytest.approx(a[i].tolist(), abs=6e-4)


# ---- the PDF


@pytest.mark.parametrize(
    ("parameters", "present", "absent"),
    [
        ({}, ["Batch norm", "SiLU", "max-pooling", "itself", "with exactly"], ["Resid", "softmax"]),
        ({"normalise": False}, ["SiLU"], ["atch norm", "atch-norm", "biases"]),
        ({"blocks": [{"channels": 8, "kernels": [3]}]}, ["SiLU"], ["pooling"]),
        ({"activation": "none"}, ["Batch norm"], ["activation", "SiLU"]),
        ({"gate": "uniform"}, ["not learned"], ["with exactly", "itself", "starts at"]),
        ({"gate": "constant"}, ["the same for all images"], ["with exactly", "itself"]),
        ({"gate": "softmax"}, ["softmax", "sum to 1"], ["itself"]),
        ({"stem_filters": 0, "flip": False, "translate": 0}, [], ["hitening", "flip", "transl"]),
        ({"label_smoothing": 0.0}, ["loss is cross-entropy."], ["smooth"]),
        ({"skip_easy": 0.5, "cutout": 8}, ["InfoBatch", "Cutout"], []),
    ],
)
def test_pdf_is_true_for_any_parameters(
    finish: Make, parameters: dict, present: list[str], absent: list[str]
) -> None:
    plots = dict.fromkeys(("block", "network", "losses", "accuracy"), EMPTY)
    given = {"data": json.dumps(pdf.pdf_content(finish(**parameters)) | {"plots": plots})}
    template = Path(pdf.__file__).with_name("report.typ").read_text(encoding="utf-8")
    source = template.replace("#grid(", "#table(").encode("utf-8")  # typst's HTML knows no grid
    html = typst.compile(source, format="html", sys_inputs=given).decode("utf-8")
    said = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", "", html, flags=re.S))
    assert "10.00%" in said and "STAND-IN" in said
    assert [words for words in present if words not in said] == []
    assert [words for words in absent if words in said] == []
    assert "History" not in said and "adder" not in said, "this is not the project's run"


@pytest.mark.parametrize("blocks", [1, 9, 30])
def test_pdf_has_three_pages_at_most(
    finish: Make, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"channels": 8 + k % 3, "kernels": [3, 1]} for k in range(blocks)]
    warned: list[typst.TypstWarning] = []  # of page numbers that never settle, say

    def compiled(*given: Any, **named: Any) -> bytes:
        content, warnings = typst.compile_with_warnings(*given, **named)
        warned.extend(warnings)
        return content

    monkeypatch.setattr(pdf.typst, "compile", compiled)
    pdf.make_pdf(finish(blocks=rows, cutout=8, skip_easy=0.5), tmp_path / "report.pdf")
    assert warned == []
    (pages,) = re.findall(rb"/Type/Pages/Count (\d+)", (tmp_path / "report.pdf").read_bytes())
    assert 2 <= int(pages) <= 3


# ---- executing


@pytest.mark.parametrize(
    ("stops", "said"),
    [("1 / 0", r"at cell \[4\]: ZeroDiv"), ("import os\nos._exit(1)", "its kernel died")],
)
def test_a_notebook_that_stops_is_kept(tmp_path: Path, stops: str, said: str) -> None:
    nbformat.write(notebook_of("print(seed)", stops), tmp_path / "a.ipynb")
    with pytest.raises(ProjectError, match=f"a stopped .*{said}.* is in .*b.ipynb"):
        execute.execute("a", tmp_path / "b.ipynb", {"seed": 7, "epochs": 3}, tmp_path)
    made = nbformat.read(tmp_path / "b.ipynb", as_version=4)
    assert [cell.outputs[0].text for cell in made.cells if "(seed" in cell.source] == ["7\n"]


def test_a_kernel_that_does_not_start_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python3").mkdir()
    spec = {"argv": [sys.executable, "-c", "raise SystemExit(1)"], "display_name": "Python"}
    text = json.dumps(spec | {"language": "python"})
    (tmp_path / "python3" / "kernel.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr("jupyter_client.kernelspec.jupyter_path", lambda *_: [str(tmp_path)])
    nbformat.write(notebook_of("1"), tmp_path / "a.ipynb")
    with pytest.raises(ProjectError, match=r"could not start .* install ipykernel") as stop:
        execute.execute("a", tmp_path / "b.ipynb", {}, tmp_path)
    assert len(str(stop.value)) <= 240 and "\n" not in str(stop.value)


# ---- the commands


@pytest.mark.parametrize("module", [report, bench, study])
def test_commands_have_help_and_refuse_what_they_do_not_know(
    module: object, capsys: pytest.CaptureFixture
) -> None:
    for arguments, status in ((["--help"], 0), (["--wrong"], 2)):
        with pytest.raises(SystemExit) as stop:
            module.main(arguments)
        assert stop.value.code == status
    printed = capsys.readouterr()
    assert "usage: python -m helpers" in printed.out and "--wrong" in printed.err


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--preset=smal", "did you mean small"),
        ("--preset=", "no preset ''"),
        ("--seed=-1", "seed = -1"),
        ("--preset=smoke", "smoke-seed0 is being made by another process"),
    ],
)
@pytest.mark.usefixtures("records")
def test_what_cannot_be_made_is_refused_at_once(
    argument: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.ImageData("stand-in", None, None)
    monkeypatch.setattr(execute, "REPORT", tmp_path)
    monkeypatch.setattr(data, "load_data", lambda: images)
    (tmp_path / "smoke-seed0").mkdir()
    with FileLock(tmp_path / "smoke-seed0" / ".lock"), pytest.raises(SystemExit, match=said):
        report.main([argument])


def test_readme_holds_the_table_of_the_records_that_are_committed(records: Path) -> None:
    git = ["git", "ls-files", "notebooks/runs"]
    files = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in {Path(file).parts[2] for file in files.splitlines()}:
        (records / name).symlink_to(ROOT / "notebooks" / "runs" / name)
    text = pages.README.read_text(encoding="utf-8")
    assert pages.with_table(text) == text


def test_hand_in_is_the_notebooks_and_helpers_of_today() -> None:
    notebook = nbformat.read(handin.HANDIN / "report.ipynb", as_version=4)
    nbformat.validate(notebook)
    made = handin.make_notebook(runs.read(execute.submitted()))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in made.cells]
    assert (handin.HANDIN / "report.ipynb").stat().st_size < 10_000_000


@pytest.mark.slow
def test_whole_report_and_again_without_training(copy_project: Callable[[], Path]) -> None:
    folder = copy_project()
    command = [sys.executable, "-m", "helpers.report", "--preset", "smoke"]
    for said in ("epoch   2/2", "is already finished"):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stderr[-3000:]
    made = {path.name for path in (folder / "report" / "smoke-seed0").iterdir()}
    assert {"index.html", "explorer.html", "report.pdf", "05_weights.html"} <= made
