"""The report: the five notebooks in order, and their pages for a browser.

    python -m helpers.report --preset small --seed 0
    python -m helpers.report --publish 01 02
    python -m helpers.report --handin

The first executes copies of the notebooks in report/<run>/ and renders them there; stopped and
started again, it resumes. The second stores in notebooks/ what the notebooks give with their own
parameters. Both end with the sheet's PDF. The third makes what is handed in, in handin/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from filelock import FileLock, Timeout

from helpers import data, runs
from helpers.project import ProjectError, exit_with_message, short
from helpers.report import execute
from helpers.report.handin import make_handin
from helpers.report.pages import render, update_readme, write_overview
from helpers.report.pdf import make_pdf
from helpers.settings import Settings, read_preset

NUMBERS = [name[:2] for name in execute.SEQUENCE]


def make_report(preset: str, seed: int | None = None) -> Path:
    """Execute the notebooks with a preset and a seed (default: the preset's), one run for all, and
    render them. Returns the start page, `report/<run>/index.html`."""
    parameters = read_preset(preset) | ({} if seed is None else {"seed": seed})
    settings, images = Settings(**parameters), data.load_data()
    config = settings.model_dump(mode="json") | {"dataset": images.name}
    run = runs.free_name(settings.run_name, config)
    folder = execute.REPORT / run
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            print(f"Preset {preset}, run {run}, into {short(folder)}", flush=True)
            for name in execute.SEQUENCE:
                target, given = folder / f"{name}.ipynb", parameters | {"run": run}
                notebook = execute.execute(name, target, given)
                render(notebook, target.with_suffix(".html"), images.name)
                print(f"{name:<20} {notebook.metadata.papermill.duration:6.0f} s", flush=True)
            made = runs.read(run)
            make_pdf(made, folder / "report.pdf")
            return write_overview(made, images, folder)
    except Timeout:
        raise ProjectError(
            f"{short(folder)} is being made by another process; wait for it, or use another seed."
        ) from None


def publish(numbers: list[str]) -> None:
    """Execute notebooks with their own parameters and store the outputs in `notebooks/`; with 04
    comes the PDF of the run that it analyses. The README's table is written anew."""
    if data.load_data().name != "cifar10":
        raise ProjectError("Outputs are published for CIFAR-10 only; put it into data/.")
    for name in execute.SEQUENCE:
        if name[:2] in numbers:
            target = execute.REPORT / "published" / f"{name}.ipynb"
            execute.store_outputs(name, execute.execute(name, target, {}))
            print(f"Stored {name}", flush=True)
    if execute.ANALYSIS[:2] in numbers:
        make_pdf(runs.read(execute.submitted()), execute.NOTEBOOKS / "report.pdf")
    update_readme()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m helpers.report", None, __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--preset", help="a file in notebooks/parameters/; otherwise small")
    parser.add_argument("--seed", type=int, help="otherwise the preset's")
    stored = "store outputs in notebooks/, of all notebooks or of these"
    parser.add_argument("--publish", nargs="*", choices=NUMBERS, help=stored)
    parser.add_argument("--handin", action="store_true", help="make what is handed in")
    options = parser.parse_args(arguments)
    if options.publish is not None and (options.preset, options.seed) != (None, None):
        parser.error("--publish takes the notebooks' own parameters")
    with exit_with_message("what was executed is in report/"):
        if options.publish is not None:
            publish(options.publish or NUMBERS)
        elif options.handin:
            make_handin()
        else:
            preset = "small" if options.preset is None else options.preset
            print(f"Open {short(make_report(preset, options.seed))}")


if __name__ == "__main__":
    main()
