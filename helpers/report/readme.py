"""Rewrite the README's table of results, between its two markers, from the records."""

from __future__ import annotations

import pandas as pd

from helpers import evaluation, runs
from helpers.project import ROOT, ProjectError, write_file

README = ROOT / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
HEAD = """\
| what | hardware | minutes | test accuracy in % | with six views | n |
|:--|:--|--:|--:|--:|--:|
"""


def results_table() -> str:
    """This project's recipes, the quickest first; the best earlier one; the published report."""
    best = runs.history().nlargest(1, "accuracy")
    best = best.rename(columns={"name": "preset", "machine": "hardware"})
    rows = [HEAD]
    for what, table in (("", runs.results()), ("best earlier recipe, ", best)):
        for row in table.itertuples():
            deviation = "" if pd.isna(row.deviation) else f" ± {100 * row.deviation:.2f}"
            rows.append(
                f"| {what}`{row.preset}` | {row.hardware} | {row.minutes:.1f} "
                f"| {100 * row.accuracy:.2f}{deviation} | {100 * row.tta:.2f} | {row.n} |\n"
            )
    minutes, accuracy = evaluation.PUBLISHED_MINUTES, 100 * evaluation.PUBLISHED
    rows.append(f"| published report | a GPU | {minutes} | {accuracy:.2f} | | 1 |\n")
    return "".join(rows)


def with_table(text: str) -> str:
    """The README with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ProjectError(f"README.md has to hold {BEGIN.strip()} and {END}; put them back.")
    return before + BEGIN + results_table() + END + after


def update() -> None:
    write_file(README, with_table(README.read_text(encoding="utf-8")))
