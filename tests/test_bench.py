"""The benchmark measures what it says, and its record is whole."""

import dataclasses
import inspect
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from helpers import bench, mixing, model, runs
from helpers.model import IntermediateBlock

here = pytest.mark.skipif(bool(mixing.missing()), reason=mixing.missing() or "it is here")


def test_candidates_take_turns_and_the_slow_one_is_found() -> None:
    order = []

    def wait(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    candidates = {"quick": lambda: wait("quick", 0.0), "slow": lambda: wait("slow", 0.01)}
    seconds = bench.one_after_another(candidates, rounds=3, repeats=2)
    assert seconds["slow"] >= 0.01 > seconds["quick"]
    turns = [name for name, before in zip(order, ["", *order]) if name != before]
    assert turns == ["quick", "slow"] * 3


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["branches", "auto"])
def test_a_block_runs_forward_and_backward(
    form: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.BATCH, "cpu", 2)
    block = bench.IntermediateBlock(3, 4, 2, bias=False, form=form)
    bench.there_and_back(block, 3, 4, bench.LAST, precision)()
    assert all(branch.weight.grad.abs().sum() > 0 for branch in block.branches)
    assert block.fc.weight.grad is not None


def test_a_step_changes_the_network() -> None:
    torch.manual_seed(0)
    step = bench.step_of(4, size=8)
    losses = [step()[0].mean() for _ in range(8)]
    assert min(losses[-3:]) < losses[0]


def test_every_way_that_is_tried_can_be_called() -> None:
    known = (
        inspect.signature(bench.time_step).parameters | inspect.signature(bench.step_of).parameters
    )
    fields = {field.name for field in dataclasses.fields(runs.Settings)}
    for name, options in bench.TRIED.items():
        assert set(options) <= set(known) | fields, name


def test_the_record_holds_every_case() -> None:
    blocks = runs.benchmark("blocks")
    hardware = runs.read_json(runs.latest_benchmark() / "machine.json")["hardware"]
    left_out = set() if hardware.get("compiled") else {"compiled"}
    measured = set(bench.FORMS) - left_out
    four = blocks[(blocks["L"] == 4) & (blocks["precision"] == "float32")]
    for shape in bench.SHAPES:
        own = four[(four[["in", "out", "map"]] == list(shape)).all(axis=1)]
        assert set(own["form"]) == measured, shape
    steps = runs.benchmark("steps")
    assert (steps.groupby("precision").size() == 2 * len(bench.BRANCHES)).all()
    assert set(steps["precision"]) == set(blocks["precision"])
    assert (steps.loc[steps["L"] == 1, "ratio"] == 1).all()
    full = runs.benchmark("full")
    assert (full.loc[full["form"] == "branches", "ratio"] == 1).all()
    assert (full.loc[full["form"] == "auto", "ratio"] < 1.05).all()
    memory = runs.benchmark("memory")
    assert (memory.groupby("precision").size() == 2 * len(bench.BRANCHES)).all()
    assert set(memory["precision"]) == set(blocks["precision"])
    ways = [way for way, options in bench.TRIED.items() if options.get("form") not in left_out]
    assert list(runs.benchmark("tried")["tried"]) == ways
    assert runs.benchmark("profile")["share"].sum() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "folder", runs.benchmark_folders(having="compiled"), ids=lambda folder: folder.name
)
def test_auto_takes_the_program_where_it_pays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record that justifies `Rule.compiled` holds every case; its forms are those of now."""
    monkeypatch.setattr(model, "instructions", lambda: folder.name)
    monkeypatch.setattr(mixing, "missing", lambda: "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    table = runs.benchmark("compiled", folder)
    cases = len(bench.NEARLY_EVEN) * len(bench.CHANNELS)
    assert (table.groupby("precision").size() == cases).all()
    for row in table.to_dict("records"):
        sizes = [int(k) for k in row["kernels"].split("+")]
        precision, c, size = getattr(torch, row["precision"]), row["in"], row["map"]
        with torch.device("meta"):
            block = IntermediateBlock(c, row["out"], len(sizes), sizes, bias=False)
        assert bench.forms_taken(block, c, size, precision) == row["auto"], row
        block.compiles = lambda: False
        assert bench.forms_taken(block, c, size, precision) == row["other"], row
    taken = table[table["auto"] == "compiled"]
    assert taken["ratio"].median() < 0.9 and taken["ratio"].max() < 1.1
    left = table[table["saved"] < model.RULES[folder.name, "float32"].compiled]
    assert left["ratio"].median() > 0.95 and not (left["auto"] == "compiled").any()


@here
def test_a_block_by_the_program_is_compared_with_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "NEARLY_EVEN", (((3, 3, 3), 4), ((5, 3), 2)))
    monkeypatch.setattr(bench, "CHANNELS", ((8, 16),))
    monkeypatch.setattr(bench, "precisions", lambda: ["float32"])
    table = bench.bench_compiled()
    assert table["kernels"].tolist() == ["3+3+3", "5+3"]
    assert table["saved"].tolist() == [2 * 16, pytest.approx(4 * 9 / 25)]
    assert not table["other"].str.contains("compiled").any()
    assert (table[["milliseconds", "ratio"]] > 0).all(axis=None)


def test_the_record_of_a_gpu_is_kept_apart() -> None:
    (gpu,) = runs.benchmark_folders("cuda")
    assert gpu not in runs.benchmark_folders()
    assert runs.benchmark_machine(gpu).startswith("NVIDIA")
    assert len(runs.benchmark("steps", gpu)) == 2 * len(bench.BRANCHES)
    for table in ("profile", "profile_full"):
        shares = runs.benchmark(table, gpu).set_index("what")["share"]
        assert list(shares.index[:-1]) == [*bench.CONVOLUTIONS["cuda"], *bench.OTHERS]
        assert shares.sum() == pytest.approx(1, abs=0.01)


def gpu_blocks() -> dict[tuple[int, int, int, str], dict[str, float]]:
    """What a benchmark of blocks printed on a GPU: of channels in and out, the map's size and the
    kernels, the ratios of the forms to one plain convolution."""
    (gpu,) = runs.benchmark_folders("cuda")
    lines = (gpu / "blocks.txt").read_text(encoding="utf-8").splitlines()
    parts = r"(\d+)→(\d+) at (\d+)×\d+, kernels (\S+):|(\w+) ([\d.]+)"
    cases = [re.findall(parts, line) for line in lines]
    return {
        (*map(int, case[0][:3]), case[0][3]): {form: float(ratio) for *_, form, ratio in case[1:]}
        for case in cases
    }


def test_on_a_gpu_no_convolution_for_each_branch_is_much_quicker_than_autos() -> None:
    measured = gpu_blocks()
    assert len(measured) == 29
    for (c, out, size, kernels), ratios in measured.items():
        sizes = [int(k) for k in kernels.split("+")]
        on_gpu = SimpleNamespace(shape=torch.Size((1, c, size, size)), device=torch.device("cuda"))
        ((form, _),) = IntermediateBlock(c, out, len(sizes), sizes).parts(on_gpu)
        assert round(ratios[form] / ratios["fused"], 2) <= 1.01
        quickest = min(ratios[own] for own in ("branches", "fused", "scaled"))
        assert round(ratios[form] / quickest, 2) <= 1.07
    four = [ratios["auto"] for (*_, kernels), ratios in measured.items() if kernels == "3+3+3+3"]
    one = [ratios["auto"] for (*_, kernels), ratios in measured.items() if kernels == "3"]
    said = (runs.RUNS / "README.md").read_text(encoding="utf-8")
    assert f"{min(four):.1f} to {max(four):.0f} times one plain" in said
    assert f"and one takes {min(one):.1f} to {max(one):.1f} times" in said
    assert "1.07 times as slow as the quickest way" in " ".join(said.split())


def test_the_aims_are_held_against_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older record, whose steps do not say their number type."""
    monkeypatch.setattr(runs, "BENCHMARKS", tmp_path)
    (tmp_path / "AVX2").mkdir()
    blocks = [(8, 4, "auto", 2.04), (16, 4, "auto", 1.5), (32, 4, "auto", 1.31)]
    blocks += [(32, 4, "grouped", 1), (32, 8, "auto", 9), (4, 4, "auto", 9)]
    table = pd.DataFrame(blocks, columns=["map", "L", "form", "ratio"]).assign(precision="float32")
    table.to_csv(tmp_path / "AVX2" / "blocks.csv", index=False)
    took = {("auto", 1): 12, ("branches", 1): 10, ("auto", 4): 20, ("auto", 8): 20}
    took |= {("branches", 4): 40, ("branches", 8): 80}
    steps = pd.DataFrame([(*key, value) for key, value in took.items()])
    steps.columns = ["form", "L", "milliseconds"]
    steps.to_csv(tmp_path / "AVX2" / "steps.csv", index=False)
    machine = {"finished": "2026", "hardware": {"device": "cpu", "instructions": "AVX2"}}
    runs.write_json(tmp_path / "AVX2" / "machine.json", machine)
    aims = runs.benchmark_aims()
    assert aims.index.tolist() == [("aimed at", ""), ("AVX2", "float32")]
    assert aims.iloc[1].tolist() == ["1.3 to 1.5", "2.0", "2.0", "33%", "0%"]


def test_a_benchmark_that_is_not_whole_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "BENCHMARKS", tmp_path)
    with pytest.raises(runs.RunError, match=r"no whole benchmark in .*`make bench` makes one"):
        runs.latest_benchmark()
    for name, day in (("AVX2", 1), ("AVX512", 2)):
        (tmp_path / name).mkdir()
        for table in runs.CPU_TABLES:
            (tmp_path / name / f"{table}.csv").write_text("a\n1\n")
        machine = {"finished": f"2026-01-0{day}", "hardware": {"device": "cpu"}}
        runs.write_json(tmp_path / name / "machine.json", machine)
    assert runs.latest_benchmark().name == "AVX512"
    (tmp_path / "AVX512" / "full.csv").unlink()
    assert runs.latest_benchmark().name == "AVX2"
    with pytest.raises(runs.RunError, match=r"AVX512/full\.csv is missing"):
        runs.benchmark("full", tmp_path / "AVX512")
    assert [folder.name for folder in runs.benchmark_folders(having="full")] == ["AVX2"]
    assert set(runs.CPU_TABLES) == set(bench.MEASUREMENTS) - {"profile_full", "compiled"}


def test_a_benchmark_says_when_each_table_was_measured(tmp_path: Path) -> None:
    machine = {"hardware": {"processor": "one", "threads": 2}, "versions": {"torch": "2"}}

    def measured() -> set[str]:
        tables = {path.stem for path in tmp_path.glob("*.csv")}
        record = runs.read_json(tmp_path / "machine.json")
        assert set(record["measured"]) == tables
        assert record["finished"] == min(record["measured"].values())
        return tables

    table = pd.DataFrame({"a": [1 / 3]})
    for name in ("blocks", "steps"):
        bench.keep(tmp_path, name, table, machine)
    assert measured() == {"blocks", "steps"}
    assert (tmp_path / "blocks.csv").read_text() == "a\n0.3333\n"


def test_a_benchmark_that_was_stopped_leaves_the_old_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of before are replaced all together, or not at all."""
    monkeypatch.setattr(runs, "BENCHMARKS", tmp_path)
    table = pd.DataFrame({"a": [1]})

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "MEASUREMENTS", {"blocks": lambda: table, "steps": lambda: table})
    bench.main([])
    folder = tmp_path / runs.instructions()
    old = runs.read_json(folder / "machine.json")
    monkeypatch.setitem(bench.MEASUREMENTS, "blocks", lambda: table + 1)
    monkeypatch.setitem(bench.MEASUREMENTS, "steps", interrupt)
    with pytest.raises(SystemExit, match="tables of before are as they were"):
        bench.main([])
    assert runs.benchmark_folders() == [folder]
    assert runs.read_json(folder / "machine.json") == old
    assert (folder / "blocks.csv").read_text() == "a\n1\n"
    monkeypatch.setitem(bench.MEASUREMENTS, "steps", lambda: table)
    bench.main([])
    assert (folder / "blocks.csv").read_text() == "a\n2\n"
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "underway"}
    assert not list((tmp_path / "underway").iterdir())


def test_an_unreadable_benchmark_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "BENCHMARKS", tmp_path)
    folder = tmp_path / runs.instructions()
    folder.mkdir()
    (folder / "machine.json").write_text("{")
    with pytest.raises(SystemExit, match=r"machine\.json cannot be read"):
        bench.main(["steps"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tried", "--device", "cuda"], "tried not measured here; what is: blocks, steps"),
        (["bloks"], "bloks not measured here"),
        (["steps"], "of no machine yet; measure all tables here, not some"),
        pytest.param(
            ["--device", "cuda"], "device = 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_by_name(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(runs, "BENCHMARKS", tmp_path)
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_machine_is_named() -> None:
    assert re.search(r"\d+ threads", runs.benchmark_machine())


@pytest.mark.parametrize("folder", runs.benchmark_folders(), ids=lambda folder: folder.name)
def test_auto_is_never_much_worse_than_the_best_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model.RULES` are right about the shapes that were measured on each kind of CPU."""
    monkeypatch.setattr(model, "instructions", lambda: folder.name)
    blocks = runs.benchmark("blocks", folder)
    compiled = "compiled" in set(blocks["form"])
    monkeypatch.setattr(mixing, "missing", lambda: "" if compiled else "No compiler.")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for case, own in blocks.groupby(["precision", "in", "out", "map", "kernels"]):
        precision, c, out, size, kernels = case
        ratio = own.set_index("form")["ratio"].drop("auto")
        sizes = [int(k) for k in kernels.split("+")]
        with torch.device("meta"):
            block = IntermediateBlock(c, out, len(sizes), sizes, bias=False)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            (form, part), *rest = block.parts(torch.empty(1, c, size, size))
        if not rest:  # else it is no form of the table
            own = ratio.get(form, ratio["fused"])  # "scaled" came when others had been measured
            assert own <= 1.35 * ratio.min(), case
