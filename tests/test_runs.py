"""Records: read whole or refused by name; one that is damaged never disturbs another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from filelock import FileLock

from helpers import project, runs
from helpers.data import ImageData
from helpers.runs import RunError, RunWriter
from helpers.settings import Settings

SETTINGS = Settings(blocks=[{"channels": 8, "kernels": [3]}], epochs=4, device="cpu")
ROW = {"epoch": 1, "size": 32, "loss": 1.0, "test_accuracy": 0.5, "seconds": 1.0}
METRICS = {
    "dataset": "cifar10", "preset": "small", "seed": 0, "epochs": 1, "test_accuracy": 0.9,
    "test_accuracy_tta": 0.91, "training_accuracy": 0.95, "validation_accuracy": None,
    "train_seconds": 60.0, "parameters": 10, "finished": "2026-11-30",
    "hardware": {"processor": "X", "threads": 2, "device": "cpu", "precision": "float32"},
}  # fmt: skip


def make(name: str, accuracy: float = 0.9, **changes: object) -> runs.Run:
    """A finished record of that name, with settings that differ so."""
    settings = Settings(**SETTINGS.model_dump() | {"run": name} | changes)
    with RunWriter(settings, "cifar10") as record:
        record.add_epoch(ROW, [{"epoch": 1, "batch": 1, "loss": 1.0, "learning_rate": 0.1}])
        return record.finish(
            settings.network(), METRICS | {"seed": settings.seed, "test_accuracy": accuracy}
        )


def test_what_is_written_is_read_again(records: Path) -> None:
    made = make("one", seed=3)
    read = runs.read("one")
    assert (read.config, read.metrics) == (made.config, made.metrics)
    assert read.settings == Settings(**SETTINGS.model_dump() | {"run": "one", "seed": 3})
    assert read.history.equals(made.history)
    drawn = torch.get_rng_state()
    network = runs.load_network(read)
    assert not network.training and torch.equal(torch.get_rng_state(), drawn)
    assert sorted(path.name for path in read.folder.iterdir()) == [
        "batches.csv", "config.json", "history.csv", "metrics.json", "weights.pt",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{}"),
        ("config.json", "[1]"),
        ("config.json", '{"dataset": "cifar10", "unknown": 1}'),
        ("metrics.json", "{"),
        ("metrics.json", '{"dataset": "cifar10"}'),
        ("metrics.json", json.dumps(METRICS | {"hardware": 2})),
        ("metrics.json", json.dumps(METRICS | {"test_accuracy": "high"})),
        ("metrics.json", json.dumps(METRICS | {"test_accuracy": float("nan")})),
        ("metrics.json", json.dumps(METRICS | {"test_accuracy_tta": 96.0})),
        ("history.csv", ""),
        ("history.csv", "epoch\n"),
        ("batches.csv", "\0"),
    ],
)
def test_a_damaged_record_is_named_and_left_out(
    file: str, content: str, records: Path, capsys: pytest.CaptureFixture
) -> None:
    make("good")
    make("bad")
    (records / "bad" / file).write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match="bad") as error:
        runs.read("bad")
    assert len(str(error.value)) <= 240
    assert [run.name for run in runs.finished()] == ["good"]
    assert capsys.readouterr().out.count("\n") == 1
    assert len(runs.results()) == 1
    assert len(runs.seeds_of(runs.read("good"))) == 1


def test_a_missing_file_of_a_record_is_named(records: Path) -> None:
    for file in ("config.json", "history.csv", "batches.csv"):
        make("bad")
        (records / "bad" / file).unlink()
        with pytest.raises(RunError, match="bad"):
            runs.read("bad")
        assert runs.finished() == []
        shutil.rmtree(records / "bad")


def test_a_table_that_cannot_be_read_is_named(records: Path) -> None:
    for content in (b"", b"\xff\xfe", b'a,b\n"1'):
        (records / "history.csv").write_bytes(content)
        with pytest.raises(RunError, match=r"history\.csv cannot be read .* restore it"):
            runs.history()


def test_a_wrong_name_gets_the_nearest(records: Path) -> None:
    make("small-seed0")
    make("large-seed0")
    with pytest.raises(RunError, match=r"small-seed0.*2 are known"):
        runs.read("smal-seed0")
    with pytest.raises(RunError, match="no run ''"):
        runs.read("")


def test_weights_that_are_not_those_of_the_run_are_refused(records: Path) -> None:
    run = make("one")
    path = run.folder / "weights.pt"
    whole = path.read_bytes()
    for content in (whole[:-9], b"", whole[:200] + b"x" + whole[201:]):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"weights\.pt"):
            runs.load_network(run)
    path.unlink()
    with pytest.raises(RunError, match="no usable weights"):
        runs.load_network(run)


def test_a_run_of_other_data_is_not_analysed(records: Path, images: ImageData) -> None:
    with pytest.raises(RunError, match="stand-in"):
        runs.check_same_data(make("one"), images)


def test_two_processes_do_not_write_one_record(records: Path) -> None:
    (records / "one").mkdir()
    settings = Settings(**SETTINGS.model_dump() | {"run": "one"})
    with (
        FileLock(records / "one" / ".lock"),
        pytest.raises(RunError, match="another process"),
        RunWriter(settings, "cifar10"),
    ):
        pass


def test_names_that_are_taken_get_a_number(records: Path) -> None:
    with RunWriter(SETTINGS, "cifar10") as first:
        pass
    with RunWriter(SETTINGS, "cifar10") as again:  # begun, and not finished
        assert again.name == first.name == "small-seed0"
        again.add_epoch(ROW, [ROW])
        again.finish(SETTINGS.network(), dict(METRICS))
    with RunWriter(SETTINGS, "cifar10") as finished:
        assert finished.finished() is not None
    (records / "small-seed0" / "weights.pt").unlink()
    with RunWriter(SETTINGS, "cifar10") as other:
        assert other.name == "small-seed0-2"
    changed = Settings(**SETTINGS.model_dump() | {"epochs": 5})
    with RunWriter(changed, "cifar10") as third:
        assert third.name == "small-seed0-3"


def test_a_folder_that_cannot_be_written_is_said(records: Path) -> None:
    (records / "one").write_text("a file", encoding="utf-8")
    settings = Settings(**SETTINGS.model_dump() | {"run": "one"})
    with pytest.raises(RunError, match="cannot be written"), RunWriter(settings, "cifar10"):
        pass


def test_tables_average_over_seeds_of_one_recipe_and_machine(
    records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "BENCHMARKS", records)
    row = 'machine,precision,what,milliseconds\n{}, 2 threads",float32,reference step,200\n'
    (records / "x-2-threads.csv").write_text(row.format('"X'), encoding="utf-8")
    (records / "a-2-threads.csv").write_text("foreign", encoding="utf-8")
    assert runs.results().empty
    make("a", 0.90)
    make("b", 0.92, seed=1)
    make("c", 0.95, seed=1, epochs=5)
    make("d", 0.99, validation=100)
    table = runs.results()
    assert table["n"].tolist() == [2, 1]
    assert table["accuracy"].tolist() == pytest.approx([0.91, 0.95])
    assert table["deviation"].iloc[0] == pytest.approx(0.02 / 2**0.5)
    assert table["reference_epochs"].tolist() == [METRICS["train_seconds"] / 20] * 2
    assert runs.seeds_of(runs.read("b"))["run"].tolist() == ["a", "b"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    def fails(file: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "kept"
    project.write_file(path, "old")
    with pytest.raises(OSError, match="No space"):
        project.write_file(path, fails)
    assert path.read_text(encoding="utf-8") == "old"
    project.write_file(path, "new – σ", keep=tmp_path / "before")
    assert (tmp_path / "before").read_text(encoding="utf-8") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "kept"]


def test_the_records_of_the_project_can_be_read() -> None:
    """Those that the notebooks speak of, with the weights of the submitted network."""
    for folder in project.RUNS.glob("*-seed*"):
        if (folder / "metrics.json").is_file():
            runs.read(folder.name)
    assert {"accuracy", "minutes", "machine", "commit"} <= set(runs.history().columns)
    submitted = runs.read("full-seed1")
    network = runs.load_network(submitted)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 11_021_388
    assert network(torch.zeros(1, 3, 32, 32)).isfinite().all()
    config = json.loads((submitted.folder / "config.json").read_text(encoding="utf-8"))
    assert pd.Series(config).notna().all()
