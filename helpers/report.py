"""The report: the five notebooks in order through papermill, and their pages for a browser.

    python -m helpers.report --preset quick --seed 0
    python -m helpers.report --publish --only 01 02

The first executes copies of the notebooks in `report/<preset>/` and renders them there; the
second stores in `notebooks/` what the notebooks give with their own parameters. Both end with the
sheet's PDF.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import typst
from jinja2 import DictLoader, pass_context
from latex2mathml.converter import convert
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from helpers import data, evaluation, figures, model, runs, training
from helpers.evaluation import mean_and_deviation
from helpers.explorer import write_explorer

NOTEBOOKS = data.ROOT / "notebooks"
REPORT = data.ROOT / "report"
SEQUENCE = (
    "01_data_exploration", "02_model_definition", "03_training", "04_analysis", "05_weights",
)  # fmt: skip
TRAINING = "03_training"
# Parameters of a run that have no place in its full cell of parameters.
UNDECLARED = {"measure_training_every", "start_from", "statistics", "trivial_augment"}
# Preset and seed of the run that is the result: 04 and 05 analyse it, its weights are kept.
BEST, BEST_SEED = "full", 1


class ReportError(Exception):
    """The report cannot be made; the message says what stopped it, and where or what to do."""


# ---- the sequence


def make_report(preset: str, seed: int) -> Path:
    """Execute the five notebooks with a preset and a seed, one run for all, and render them.

    Returns:
        the page to begin with, `report/<preset>/index.html`.

    Raises:
        ParameterError: see `runs.read_preset`.
        ReportError: a notebook stopped.
    """
    folder = REPORT / preset
    parameters = runs.read_preset(preset) | {"seed": seed}
    settings = runs.settings_from(parameters)
    folder.mkdir(parents=True, exist_ok=True)

    print(f"Preset {preset}, into {runs.place(folder)}; first, the data.", flush=True)
    images = data.load_data()
    trained = trained_before(folder, settings, images)
    run = trained or runs.free_name(f"{preset}-seed{seed}")
    parameters |= {"run": run}
    settings = runs.settings_from(parameters)
    print(f"Run {run}{', which is trained already' * bool(trained)}.", flush=True)
    dataset, drawn = images.name, data.ROOT / "figures" / runs.label(settings, images)
    parameters |= {"start_from": begun_from(run) or earlier_run(settings, folder)}
    settings = runs.settings_from(parameters)
    if not trained:
        training.earlier_network(settings, images)  # can it be had, if one is named?
        with runs.Record(settings, images):  # can it be written and, if it is there, continued?
            remove_pages(folder)
    durations = {}
    for name in SEQUENCE:
        target = folder / f"{name}.ipynb"
        if name == TRAINING and trained:
            continue
        notebook, durations[name] = execute(name, target, parameters)
        render(notebook, target.with_suffix(".html"), dataset)
        if name == TRAINING:
            keep(notebook, run)
    finished, index = runs.read(run), folder / "index.html"
    render(overview(finished, durations), index, dataset)
    write_explorer(finished, images, folder / "explorer.html")
    make_pdf(finished, drawn, folder / "report.pdf")
    return index


def trained_before(folder: Path, settings: runs.Settings, images: data.ImageData) -> str:
    """The run of a report of these settings and images that was stopped behind its training, or
    nothing: its page of the training is there and the index, which is made last, is not."""
    notebook, page = (folder / f"{TRAINING}.{ending}" for ending in ("ipynb", "html"))
    if (folder / "index.html").is_file() or not (notebook.is_file() and page.is_file()):
        return ""
    given = nbformat.read(notebook, as_version=4).metadata.get("papermill", {})
    run = given.get("parameters", {}).get("run", "")
    if run not in runs.names():
        return ""
    earlier = runs.read(run)
    made = runs.settings_of(earlier)
    same = dataclasses.replace(settings, run=run, start_from=made.start_from) == made
    return run if same and earlier.metrics["dataset"] == images.name else ""


def remove_pages(folder: Path) -> None:
    """Remove the pages of the report that was made there before, so that none is taken for new."""
    for name in ("index", *SEQUENCE, "explorer"):
        for ending in (".ipynb", ".html"):
            (folder / f"{name}{ending}").unlink(missing_ok=True)
    (folder / "report.pdf").unlink(missing_ok=True)


def begun_from(run: str) -> str:
    """The run from which an unfinished run went on, if there is one of that name that did."""
    config = runs.RUNS / run / "config.json"
    return runs.read_json(config).get("start_from", "") if config.is_file() else ""


def earlier_run(settings: runs.Settings, folder: Path) -> str:
    """The run that a preset's run begins with, if any. Where `start_from` is another preset, that
    is its last run of the same seed; if its weights are not here, another is made first.

    Args:
        folder: where the notebook goes that makes it.

    Raises:
        ReportError: that notebook stopped.
        RunError: the record of such a run cannot be read.
    """
    start = settings.start_from
    if start not in runs.presets():
        return start
    stem = f"{start}-seed{settings.seed}"
    run = runs.free_name(stem)
    if run != stem and (runs.RUNS / (made := runs.latest(stem)) / "weights.pt").is_file():
        return made
    print(f"It goes on from a run of the preset {start}, which is made first: {run}.", flush=True)
    parameters = runs.read_preset(start) | {"seed": settings.seed, "run": run}
    own_start = begun_from(run) or earlier_run(runs.settings_from(parameters), folder)
    parameters |= {"start_from": own_start}
    notebook, _ = execute(TRAINING, folder / f"{TRAINING}_{start}.ipynb", parameters)
    keep(notebook, run)
    return run


def execute(name: str, target: Path, parameters: dict) -> tuple[NotebookNode, float]:
    """Execute notebook `name` as JupyterLab would, in its own folder, into the file `target`.

    Of `parameters` it is given those that it declares, and the training notebook, whose cell of
    parameters is full, the others of a run too. Its time is printed when it is
    done; the lines of the training notebook are printed as they come.

    Returns:
        the executed notebook, without absolute paths and with small pictures, and the seconds
        that it took.

    Raises:
        ReportError: it stopped; `target` holds what it had done.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    declared = set(papermill.inspect_notebook(source))
    if name == TRAINING:
        declared |= UNDECLARED
    started, failure = time.perf_counter(), None
    try:
        with drawing_inline():
            papermill.execute_notebook(
                source,
                target,
                {key: value for key, value in parameters.items() if key in declared},
                cwd=NOTEBOOKS,
                progress_bar=False,
                coalesce_streams=True,
                stdout_file=sys.stdout if name == TRAINING else None,
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # not on unencrypted ports
            )
    except PapermillExecutionError as error:
        failure = f"{name} stopped at its cell [{error.exec_count}], {error.ename}: {error.evalue}"
    except DeadKernelError:
        failure = f"{name} stopped because its kernel died, perhaps for want of memory"
    seconds = time.perf_counter() - started
    notebook = with_small_pictures(portable(nbformat.read(target, as_version=4)))
    nbformat.write(notebook, target)
    if failure:
        raise ReportError(f"{failure.rstrip('.')}. What it had done is in {runs.place(target)}.")
    print(f"{name:<20} {duration(seconds):>9}", flush=True)
    return notebook, seconds


@contextlib.contextmanager
def drawing_inline() -> Iterator[None]:
    """Let kernels that are started draw into their notebook, as they do unless the environment
    names another backend of matplotlib, with which there would be no picture in it."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


def keep(notebook: NotebookNode, run: str) -> None:
    """Keep the executed training notebook with the record of the run that it made."""
    content = runs.as_bytes(nbformat.writes(notebook))
    runs.write_aside(runs.RUNS / run / f"{TRAINING}.ipynb", content)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


# ---- stored outputs


def publish(numbers: list[str]) -> None:
    """Execute notebooks with their own parameters and store the outputs in `notebooks/`.

    Args:
        numbers: the first two characters of the notebooks' names. What 04 and 05 analyse is the run
            of `BEST` that is on record. With 04 comes the PDF of that run.

    Raises:
        ReportError: a notebook stopped, the data are not CIFAR-10, or outputs hold what they
            should not; then nothing is stored for that notebook.
    """
    images = data.load_data()
    if images.name != "cifar10":
        raise ReportError("The stored outputs are those of CIFAR-10, and here is only a stand-in.")
    folder = REPORT / "published"
    folder.mkdir(parents=True, exist_ok=True)
    for name in SEQUENCE:
        if name[:2] not in numbers:
            continue
        target = folder / f"{name}.ipynb"
        executed, _ = execute(name, target, {})
        if found := faults(executed):
            raise ReportError(
                f"{name} is not stored, for its outputs hold {'; '.join(found)}; "
                f"they are in {runs.place(target)}."
            )
        source = NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(source, as_version=4)
        nbformat.write(with_outputs(notebook, executed), source)
        if name == TRAINING:
            keep(executed, own_run())
    if "04" in numbers:
        best = runs.read(best_run())
        folder = draw_plots(best, runs.label(runs.settings_of(best), images))
        make_pdf(best, folder, NOTEBOOKS / "report.pdf")


def own_run() -> str:
    """The name of the latest run of the notebooks' own parameters."""
    own = runs.Settings()
    return runs.latest(f"{own.preset}-seed{own.seed}")


def best_run() -> str:
    """The name of the latest run of `BEST` with `BEST_SEED`."""
    return runs.latest(f"{BEST}-seed{BEST_SEED}")


def draw_plots(run: runs.Run, label: str) -> Path:
    """Save the figures that the PDF shows of a run, drawn from its record.

    Args:
        label: the name of their folder in `figures/`.

    Returns:
        that folder.
    """
    settings, whole = runs.settings_of(run), runs.whole_training(run)
    figures.use_style()
    drawn = {
        "02_block": figures.block_diagram(),
        "02_network": figures.network_diagram(settings.network()),
        "03_batch_losses": figures.batch_losses(
            whole.batches, runs.image_sizes(run), runs.restarts(run)
        ),
        "03_accuracy_by_epoch": figures.accuracy_by_epoch(
            whole.history, evaluation.PUBLISHED, runs.image_sizes(run), runs.restarts(run)
        ),
    }
    for name, figure in drawn.items():
        figures.save(figure, name, label)
    return data.ROOT / "figures" / label


def with_outputs(notebook: NotebookNode, executed: NotebookNode) -> NotebookNode:
    """`notebook`, its metadata untouched, with the outputs of `executed`, cell by cell."""
    for cell, done in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
    return notebook


def portable(notebook: NotebookNode) -> NotebookNode:
    """`notebook` without the paths of this machine: the project's root, the user's home, and the
    other folder that papermill may have read it from or written it to."""

    def shorten(value):
        if isinstance(value, str):
            return value.replace(f"{data.ROOT}/", "").replace(f"{Path.home()}/", "~/")
        if isinstance(value, list):
            return [shorten(item) for item in value]
        if isinstance(value, dict):
            return NotebookNode({key: shorten(item) for key, item in value.items()})
        return value

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = shorten(cell.outputs)
    if "papermill" in notebook.metadata:
        known = notebook.metadata.papermill = shorten(notebook.metadata.papermill)
        for key in ("input_path", "output_path"):
            if Path(known.get(key) or "").is_absolute():
                known[key] = Path(known[key]).name
    return notebook


def with_small_pictures(notebook: NotebookNode) -> NotebookNode:
    """`notebook` with its PNG outputs in 256 colours of their own: a third of the size, and the eye
    sees no difference at the size of a page. The files in `figures/` keep all colours."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            small = io.BytesIO()
            # Of Pillow's ways the one that keeps rare colours, such as of one small photograph.
            few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
            few.save(small, "PNG", optimize=True)
            output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return notebook


# What stored outputs should not hold. A path counts from a folder that machines have; so the
# "/" of a URL, of an HTML tag and of a fraction is none.
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
            where = f"in cell [{cell.execution_count}]"
            if output.output_type == "error":
                found.append(f"an error {where}: {output.ename}")
            text = "\n".join(texts(output))
            for fault, pattern in FAULTS.items():
                if match := pattern.search(text):
                    found.append(f"{fault} {where}: {match.group()[:60]}")
    return found


def texts(output: NotebookNode) -> list[str]:
    """The readable parts of an output: not its pictures."""
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return output.traceback
    return [value for kind, value in output.data.items() if kind.startswith("text/")]


# ---- pages

# What the lab template of nbconvert loads from the network (require.js, MathJax, Mermaid) is left
# out: the page is one file, and the browser draws formulas from MathML.
PAGE = Path(__file__).with_name("page.html.j2")
STAND_IN = "STAND-IN DATA, not CIFAR-10: the numbers on this page say nothing about CIFAR-10."


class MathRenderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def latex_environment(self, name: str, body: str) -> str:
        return convert(rf"\begin{{{name}}}{body}\end{{{name}}}", display="block")


class PageExporter(HTMLExporter):
    """A notebook to a page that needs nothing beside itself, network included."""

    def __init__(self) -> None:
        loader = DictLoader({PAGE.name: PAGE.read_text(encoding="utf-8")})
        super().__init__(template_file=PAGE.name, extra_loaders=[loader], embed_images=True)

    @pass_context
    def markdown2html(self, context, source: str) -> str:
        renderer = MathRenderer(escape=False, embed_images=True, path=str(NOTEBOOKS))
        return MarkdownWithMath(renderer=renderer).render(source)


def render(notebook: NotebookNode, target: Path, dataset: str) -> None:
    """Write `notebook` as the page `target`; on any `dataset` but CIFAR-10 it says so on top."""
    stand_in = dataset != "cifar10"
    resources = {
        "metadata": {"name": title(notebook) + " (stand-in data)" * stand_in},
        "stand_in": STAND_IN if stand_in else "",
        "pages": [
            ("index", "Overview"),
            *((name, name.replace("_", " ")) for name in SEQUENCE),
            ("explorer", "explorer"),
        ],
    }
    html, _ = PageExporter().from_notebook_node(notebook, resources)
    for name in SEQUENCE:  # links from notebook to notebook become links from page to page
        html = html.replace(f'href="{name}.ipynb', f'href="{name}.html')
    target.write_text(html, encoding="utf-8")


def title(notebook: NotebookNode) -> str:
    """The first heading."""
    heading = re.search(r"^# (.+)$", "\n".join(cell.source for cell in notebook.cells), re.M)
    return heading.group(1) if heading else "Report"


def overview(run: runs.Run, durations: dict[str, float]) -> NotebookNode:
    """The first page, as a notebook: what came out, how long each notebook took, with what."""
    rows = [
        f"| [{name.replace('_', ' ')}]({name}.ipynb) | {duration(seconds)} |"
        for name, seconds in durations.items()
    ]
    values = [
        f"| {name} | {'–' if value == '' else f'`{value}`'} |" for name, value in run.config.items()
    ]
    text = [
        "# A network of input-weighted convolution blocks",
        "",
        result(run),
        "",
        *("| Notebook | Time |", "|:--|--:|", *rows),
        "",
        "The same on three pages of paper: [report.pdf](report.pdf). Single test images, with the "
        "network's answers and the weights a: [explorer](explorer.html).",
        "",
        "## Parameters of this run",
        "",
        f"Its record is in `notebooks/runs/{run.name}/`.",
        "",
        *("| Parameter | Value |", "|:--|:--|", *values),
    ]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n".join(text))])


def result(run: runs.Run) -> str:
    """What came out, in a sentence."""
    metrics = run.metrics
    dataset = "CIFAR-10" if metrics["dataset"] == "cifar10" else "the stand-in"
    accuracy = (
        f"**Test accuracy on {dataset}: {metrics['test_accuracy']:.2%}**, without test-time "
        "augmentation"
    )
    if metrics.get("test_accuracy_tta") is not None:
        accuracy += f" ({metrics['test_accuracy_tta']:.2%} with it)"
    return (
        f"{accuracy}, after {duration(runs.training_seconds(run))} of training"
        f"{machines(runs.lineage(run))}; {metrics['parameters']:,} parameters."
    )


# ---- the PDF


# Parameters that are called there more plainly than in the code.
IN_THE_PDF = {
    "learning_rate": "learning rate (Muon)",
    "momentum": "momentum (Muon)",
    "adam_learning_rate": "learning rate (Adam)",
}


def make_pdf(run: runs.Run, drawn: Path, target: Path) -> None:
    """Typeset the sheet's PDF, at most three pages, from the records and the saved figures.

    Args:
        run: the run whose plots are shown; runs of other seeds give the mean.
        drawn: the folder with the notebooks' figures, inside the project.

    Raises:
        ReportError: a figure is missing.
    """
    needed = ("02_block", "02_network", "03_batch_losses", "03_accuracy_by_epoch")
    for name in needed:
        if not (drawn / f"{name}.svg").is_file():
            raise ReportError(
                f"{runs.place(drawn / name)}.svg is missing; execute the notebooks first."
            )
    content = pdf_content(run) | {"figures": f"/{drawn.relative_to(data.ROOT).as_posix()}"}
    template = Path(__file__).with_suffix(".typ")
    numbers = {"data": json.dumps(content)}
    try:
        typst.compile(template, output=target, root=data.ROOT, sys_inputs=numbers)
    except typst.TypstError as error:
        raise ReportError(f"{runs.place(target)} could not be typeset: {error}") from None


def pdf_content(run: runs.Run) -> dict:
    """Every number of the PDF as text, from the records."""
    settings, everywhere = runs.settings_of(run), runs.seeds_anywhere(run)
    parts = [runs.parameters_of(one) for one in runs.lineage(run)]
    seen = settings.images_of(data.TRAINING_IMAGES)
    here = everywhere[everywhere["kind"] == runs.kind_of(run)]
    elsewhere = everywhere[~everywhere.index.isin(here.index)]
    made = runs.by_cost(run.metrics["dataset"])
    others = made[~made["run"].isin(everywhere["run"].map(runs.without_seed))]
    return {
        "stand_in": "" if run.metrics["dataset"] == "cifar10" else STAND_IN,
        "result": result_of_seeds(run, here) + on_other_machines(elsewhere),
        "seed": str(settings.seed),
        "best": best_of(run, everywhere) + not_chosen(run, here["test_accuracy"].mean(), others),
        "last_statistics": last_statistics(),
        "measured": when_measured(parts, [one.history for one in runs.lineage(run)]),
        **{
            name: any(part[name] for part in parts)
            for name in (
                "skip_easy", "trivial_augment", "cutout", "translate", "first_sizes",
                "label_smoothing",
            )
        },
        "restarted": len(parts) > 1,
        "activation": settings.activation,
        "gate": settings.gate,
        "stem": bool(settings.stem_filters),
        "flip": settings.flip,
        "residual": bool(settings.residual),
        "layers": layers_in_short(model.layer_table(settings.network())),
        "hyperparameters": hyperparameters(parts),
        "statistics": settings.statistics,
        "images_for_statistics": f"{min(training.IMAGES_FOR_STATISTICS, seen):,}",
        "half": run.metrics["hardware"].get("precision") == "bfloat16",
        "seeds": [
            [
                row["run"], f"{row['test_accuracy']:.2%}", f"{row['test_accuracy_tta']:.2%}",
                f"{row['training_accuracy']:.2%}", f"{row['train_seconds'] / 60:.1f}", row["kind"],
            ]
            for _, row in everywhere.iterrows()
        ],
        "history": [
            [
                row.run, row.seeds, with_deviation(100 * row.accuracy, 100 * row.deviation, 2),
                with_deviation(row.minutes, row.minutes_deviation, 1), row.kind,
                f"{evaluation.PUBLISHED_WORK / row.work:,.0f}", new,
            ]
            for row, new in zip(made.itertuples(), what_was_new(made["run"]), strict=True)
        ],
        "choices": [
            [row[0], f"{row[1]:,}", str(row[2]), *row[3:5], f"{row[5]:.2%}"]
            for row in runs.choices(run.metrics["dataset"]).itertuples(index=False)
        ],
    }  # fmt: skip


def what_was_new(names: Iterable[str]) -> list[str]:
    """What was new in each row of `runs.by_cost`, in the words of the records' README; nothing for
    runs that it does not know. A name that comes again has a row of its own there."""
    readme = runs.RUNS / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    said: dict[str, list[str]] = {}
    for name, words in re.findall(r"^\| `([\w-]+)` \| \d+ (?:\|[^|]*){2}\| (.*) \|$", text, re.M):
        said.setdefault(name, []).append(words.replace("`", ""))
    return [said[name].pop(0) if said.get(name) else "" for name in names]


def result_of_seeds(run: runs.Run, seeds: pd.DataFrame) -> str:
    """The first sentences of the PDF: accuracy and minutes over the seeds on the run's own kind of
    machine, and the interval over images of the run itself."""
    spread = f"{len(seeds)} seeds (mean ± standard deviation)" if len(seeds) > 1 else "1 seed"
    low, high = evaluation.interval(
        round(run.metrics["test_accuracy"] * data.TEST_IMAGES), data.TEST_IMAGES
    )
    return (
        f"{mean_and_deviation(100 * seeds['test_accuracy'], 2)} % of the test images are "
        f"classified correctly after {mean_and_deviation(seeds['train_seconds'] / 60, 1)} minutes "
        f"of training{machines(runs.lineage(run))}; "
        f"n = {spread}, last epoch, no test-time augmentation. 95 % interval over images, for seed "
        f"{run.metrics['seed']}: {100 * low:.2f} to {100 * high:.2f} %."
    )


def hyperparameters(parts: list[dict[str, Any]]) -> list[list[str]]:
    """Name and value of each parameter that the PDF names and that the runs of a whole training,
    which have these parameters, make use of."""
    named = (
        "widths", "branches", "kernel_size", "gate", "stem_filters", "epochs", "first_sizes",
        "batch_size", "learning_rate", "momentum", "adam_learning_rate", "label_smoothing",
        "translate", "cutout", "trivial_augment", "skip_easy",
    )  # fmt: skip
    return [
        [IN_THE_PDF.get(name, name.replace("_", " ")), in_turn([part[name] for part in parts])]
        for name in named
        if any(part[name] for part in parts)
    ]


def machines(parts: list[runs.Run]) -> str:
    """On what the runs of a whole training were made; if it was on several, the minutes of each."""
    said = [runs.machine_of(part) for part in parts]
    if len(set(said)) == 1:
        return f" on {said[0]}"
    minutes = (f"{part.metrics['train_seconds'] / 60:.1f}" for part in parts)
    each = [f"{time} on {machine}" for machine, time in zip(said, minutes)]
    return f" ({', then '.join(each)})"


def layers_in_short(layers: pd.DataFrame) -> list[list[str]]:
    """The rows of `model.layer_table` as text, what follows a block in the row of the block: layer,
    what, output, parameters, and multiply-adds in millions."""
    rows: list[pd.Series] = []
    for name, row in layers.iterrows():
        if name.startswith("after"):
            before, row = rows.pop(), row.copy()
            row["what"] = f"{before['what']}; {row['what']}"
            for number in ("parameters", "multiply-adds as written"):
                row[number] += before[number]
            row.name = before.name
        rows.append(row)
    return [
        [
            row.name, row["what"], row["output"], f"{row['parameters']:,}",
            f"{row['multiply-adds as written'] / 1e6:.2f}",
        ]
        for row in rows
    ]  # fmt: skip


def on_other_machines(seeds: pd.DataFrame) -> str:
    """A sentence on each other kind of machine on which the same parameters were trained, from
    `runs.seeds_anywhere`."""
    said = ""
    for _, own in seeds.groupby("kind", sort=False):
        accuracy = mean_and_deviation(100 * own["test_accuracy"], 2)
        minutes = mean_and_deviation(own["train_seconds"] / 60, 1)
        named = dict.fromkeys(runs.machines_of(runs.read(name)) for name in own["run"])
        said += (
            f" The same parameters on {' and '.join(named)}: {accuracy} % after {minutes} "
            f"minutes, n = {len(own)}."
        )
    return said


def best_of(run: runs.Run, seeds: pd.DataFrame) -> str:
    """The sentences on the run's own accuracy and on the best of all runs with its parameters, from
    `runs.seeds_anywhere`."""
    best = seeds.loc[seeds["test_accuracy"].idxmax()]
    said = (
        f"The network shown here reaches {run.metrics['test_accuracy']:.2%}, and "
        f"{run.metrics['test_accuracy_tta']:.2%} with test-time augmentation (a weighted mean of "
        "six views)."
    )
    if best["run"] == run.name:
        return said + (" No other run reaches more." if len(seeds) > 1 else "")
    return (
        f"{said} The best of all {len(seeds)} runs, {best['run']}, reaches "
        f"{best['test_accuracy']:.2%} and {best['test_accuracy_tta']:.2%}; it was picked by its "
        "test accuracy, which flatters it."
    )


def not_chosen(run: runs.Run, accuracy: float, made: pd.DataFrame) -> str:
    """Sentences on trainings that ended higher than the result, if there are any."""
    higher = made[made["accuracy"] > accuracy]
    if run.config["preset"] != BEST or higher.empty:  # only `BEST` was made the result
        return ""
    named = [
        f"{row.run}, {with_deviation(100 * row.accuracy, 100 * row.deviation, 2)} % after "
        f"{with_deviation(row.minutes, row.minutes_deviation, 1)} minutes on {row.kind} "
        f"(n = {row.n})"
        for row in higher.itertuples()
    ]
    return (
        " Which network is shown was decided before it was trained; higher in the history below "
        f"ended {'; '.join(named)}."
    )


def last_statistics() -> str:
    """What the two kinds of statistics give the reported network, from the record of
    `tests/last_statistics.py`; nothing where that is not."""
    record = runs.BENCHMARKS / "last_statistics.json"
    if not record.is_file():
        return ""
    said = runs.read_json(record)
    clean, augmented = (
        said["accuracy"][f"{kind} images"]["test"] for kind in ("clean", "augmented")
    )
    return f" ({said['run']} has {clean:.2%} with the former and {augmented:.2%} with the latter)"


def with_deviation(mean: float, deviation: float, digits: int) -> str:
    """A mean of `runs.by_cost` as text, with its standard deviation unless it is of one run."""
    spread = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def when_measured(parts: list[dict[str, Any]], histories: list[pd.DataFrame]) -> str:
    """How many clean training images were measured, and after which epochs of a whole training,
    whose runs have these parameters and histories; in words."""
    every = min(part["measure_training_every"] for part in parts)
    end = "at the end"
    if any(part["measure_training_every"] < part["epochs"] for part in parts):
        end = "after each epoch" if every == 1 else f"after every {every} epochs"
    elif len(parts) > 1:
        end = "at the end of each training"
    if every > 1 and all(known["training_accuracy"].notna().all() for known in histories):
        some = training.IMAGES_IN_BETWEEN
        return f"images as they are, all {end} and {some:,} after the other epochs"
    return f"all images as they are, {end}"


def in_turn(values: list[object]) -> str:
    """A parameter of the runs of a whole training, one after the other, as text."""
    said = [in_short(value) for value in values]
    return said[0] if len(set(said)) == 1 else ", then ".join(said)


def in_short(value: object) -> str:
    """A parameter as text; of a list with repetitions, how often each value comes."""
    if value == []:
        return "none"
    if not isinstance(value, list) or len(value) < 8:
        return str(value)
    return ", ".join(f"{len(list(same))} × {one}" for one, same in itertools.groupby(value))


# ---- the command


def main(arguments: list[str] | None = None) -> None:
    """See the module's first lines; ends with one sentence and status 1 if something stops it."""
    parser = argparse.ArgumentParser(prog="python -m helpers.report", description=__doc__)
    parser.add_argument("--preset", help=f"one of {', '.join(runs.presets())}; otherwise quick")
    parser.add_argument("--seed", type=int, help="otherwise 0")
    parser.add_argument("--publish", action="store_true", help="store outputs in notebooks/")
    numbers = [name[:2] for name in SEQUENCE]
    parser.add_argument("--only", nargs="+", choices=numbers, help="publish only these")
    options = parser.parse_args(arguments)
    if options.only and not options.publish:
        parser.error("--only goes with --publish")
    if options.publish and (options.preset or options.seed is not None):
        parser.error("--publish takes the notebooks' own parameters")
    expected = (ReportError, data.DataError, runs.ParameterError, runs.RunError)
    stopped = "Stopped from the keyboard; what was executed is in report/."
    with runs.ending_in_a_sentence(expected, stopped):
        if options.publish:
            publish(options.only or numbers)
        else:
            index = make_report(options.preset or "quick", options.seed or 0)
            print(f"Begin with {runs.place(index)}")


if __name__ == "__main__":
    main()
