"""Rewrite the README's table of results, between its two markers, from the records."""

from __future__ import annotations

import argparse
import sys

import pandas as pd

from helpers import evaluation, runs
from helpers.project import ROOT, ProjectError, command, write_file

README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEAD = """\
| what | hardware | minutes | test accuracy in % | with six views | n |
|:--|:--|--:|--:|--:|--:|
"""
PUBLISHED = "| published report | a GPU | {minutes} | {accuracy:.2f} | | 1 |\n"


def results_table() -> str:
    """This project's recipes on record, the quickest first; the best of the earlier ones; the
    published report."""
    now, earlier = runs.results(), runs.history()
    now["what"] = "`" + now["preset"] + "`"
    best = earlier.sort_values("accuracy").tail(1)
    best = best.assign(what="best earlier recipe, `" + best["name"] + "`", hardware=best["machine"])
    table = pd.concat([now, best])
    deviation = table["deviation"].map(lambda sd: "" if pd.isna(sd) else f" ± {100 * sd:.2f}")
    rows = [
        f"| {row.what} | {row.hardware} | {row.minutes:.1f} "
        f"| {100 * row.accuracy:.2f}{sd} | {100 * row.tta:.2f} | {row.n} |\n"
        for row, sd in zip(table.itertuples(), deviation, strict=True)
    ]
    minutes, accuracy = evaluation.PUBLISHED_MINUTES, 100 * evaluation.PUBLISHED
    return HEAD + "".join(rows) + PUBLISHED.format(minutes=minutes, accuracy=accuracy)


def with_table(text: str) -> str:
    """The README with the table of today."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ProjectError(f"README.md has to hold {BEGIN} and {END} once each; put them back.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{results_table()}{END}{rest.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.report.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(arguments)
    with command("README.md is as it was"):
        text = README.read_text(encoding="utf-8")
        new = with_table(text)
        if options.check and new != text:
            sys.exit("README.md's table differs from the records: python -m helpers.report.readme")
        if not options.check:
            write_file(README, new)


if __name__ == "__main__":
    main()
