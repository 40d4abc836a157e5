"""A run that is stopped, in whatever way, goes on as if it had not been."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from helpers import data, runs, training
from helpers.runs import RunError, Settings

# A narrow network on few images: 160 of them make five batches.
SMALL = Settings(
    widths=[8] * 6, stem_filters=12, epochs=2, first_sizes=[16], batch_size=32, device="cpu",
    run="stopped",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(training, "SECONDS_WORTH_A_CHECKPOINT", 0)
    return tmp_path / "runs" / "stopped"


def run_to_the_end(
    images: data.ImageData, settings: Settings = SMALL
) -> tuple[torch.nn.Module, runs.Run, list[str]]:
    said: list[str] = []
    network, run = training.train(images, settings, said.append)
    return network, run, said


def told(said: list[str], words: str) -> bool:
    return any(words in line for line in said)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(
    tiny_images: data.ImageData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, runs.Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RUNS", tmp_path_factory.mktemp("undisturbed"))
        return training.train(tiny_images, SMALL, lambda line: None)


def stop_after(
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    images: data.ImageData,
    settings: Settings = SMALL,
) -> None:
    """Train until the interrupt button is pressed, in the middle of step `steps` + 1."""
    step, done = training.train_batch, []

    def interrupted(network: torch.nn.Module, *arguments: object) -> tuple:
        if len(done) == steps:
            next(network.parameters()).data.zero_()  # half a step leaves the weights anyhow
            raise KeyboardInterrupt
        done.append(1)
        return step(network, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_to_the_end(images, settings)


def assert_same_run(ours: tuple, theirs: tuple) -> None:
    (network, run, *_), (other, expected, *_) = ours, theirs
    for (name, tensor), theirs in zip(network.state_dict().items(), other.state_dict().values()):
        assert torch.equal(tensor, theirs), name
    assert run.batches.equals(expected.batches)
    timed = ["seconds", "images_per_second"]
    assert run.history.drop(columns=timed).equals(expected.history.drop(columns=timed))
    same = ("test_accuracy", "test_accuracy_tta", "training_accuracy")
    assert [run.metrics[name] for name in same] == [expected.metrics[name] for name in same]


@pytest.mark.parametrize("steps", [1, 3, 5, 9])  # within an epoch, at its end, in the last one
def test_a_stopped_run_gives_the_same_bits(
    steps: int,
    tiny_images: data.ImageData,
    undisturbed: tuple,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    stop_after(steps, monkeypatch, tiny_images)
    torch.randn(7)  # somebody else draws from the global generator
    ours = run_to_the_end(tiny_images)
    assert_same_run(ours, undisturbed)
    epoch, batch = divmod(steps, 5)
    assert ours[2][0] == (f"run stopped goes on after batch {batch} of 5 in epoch {epoch + 1}")
    assert len(runs.read("stopped").batches) == 10
    assert not list(folder.glob("checkpoint*")) and not (folder / ".lock").exists()


def test_the_quick_network_gives_the_same_bits_too(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Settings(epochs=2, first_sizes=[16], batch_size=32, device="cpu", run="straight")
    expected = run_to_the_end(tiny_images, quick)
    stopped = dataclasses.replace(quick, run="stopped")
    stop_after(7, monkeypatch, tiny_images, stopped)
    assert_same_run(run_to_the_end(tiny_images, stopped), expected)


def test_a_stopped_epoch_goes_on_without_the_same_easy_images(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dataclasses.replace(SMALL, epochs=3, skip_easy=0.8, run="straight")
    expected = run_to_the_end(tiny_images, settings)
    assert expected[1].batches.groupby("epoch").size().tolist()[1] < 5
    stopped = dataclasses.replace(settings, run="stopped")
    stop_after(7, monkeypatch, tiny_images, stopped)  # two batches into the second epoch
    assert_same_run(run_to_the_end(tiny_images, stopped), expected)


def test_the_optimisers_state_comes_back(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3, monkeypatch, tiny_images)
    with runs.Record(SMALL, tiny_images) as record:
        state = record.checkpoint()
    fresh = training.Underway(
        training.first_network(tiny_images.train, SMALL), tiny_images.train, SMALL
    )
    fresh.restore(state)
    again = fresh.state()
    for ours, theirs in zip(again["optimizers"], state["optimizers"], strict=True):
        assert len(ours["state"]) == len(theirs["state"]) > 0
        for number, own in ours["state"].items():
            for name, value in own.items():
                assert torch.equal(
                    torch.as_tensor(value), torch.as_tensor(theirs["state"][number][name])
                )
    assert torch.equal(again["mirrored_first"], state["mirrored_first"])


def test_a_run_stopped_before_its_record_is_whole_only_has_to_be_measured(
    tiny_images: data.ImageData, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "final_metrics", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_to_the_end(tiny_images)
    monkeypatch.setattr(training, "train_batch", lambda *_: pytest.fail("it trains again"))
    network, run, said = run_to_the_end(tiny_images)
    assert said[0] == "run stopped goes on after its last epoch"
    assert_same_run((network, run), undisturbed)
    assert run.metrics["interruptions"] == 1


def test_a_run_stopped_while_measuring_keeps_its_epoch(
    tiny_images: data.ImageData, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(training, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_to_the_end(tiny_images)
    ours = run_to_the_end(tiny_images)
    assert ours[2][0] == "run stopped goes on after batch 5 of 5 in epoch 1"
    assert_same_run(ours, undisturbed)


def test_checkpoints_are_never_older_than_a_minute(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that goes on by seven seconds whenever it is read: twice for each batch."""
    clock, saved = itertools.count(step=7), []
    monkeypatch.undo()
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    underway = training.Underway(
        training.first_network(tiny_images.train, SMALL), tiny_images.train, SMALL
    )
    training.train_epoch(underway, lambda: saved.append(underway.batch))
    batches = [b - a for a, b in itertools.pairwise([0, *saved])]
    assert saved[-1] == 5 and len(saved) > 1 and 2 * 7 * max(batches) <= 60


def test_another_number_of_threads_is_said(
    tiny_images: data.ImageData, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is guaranteed then, if no images are left out: the same draws, and numbers that differ
    by rounding."""
    threads = torch.get_num_threads()
    stop_after(3, monkeypatch, tiny_images)
    try:
        torch.set_num_threads(3 - min(threads, 2))  # one instead of two or more, two instead of one
        _, run, said = run_to_the_end(tiny_images)
    finally:
        torch.set_num_threads(threads)
    assert "another machine (threads" in said[1] and "not end with the bits" in said[1]
    begun, now = runs.hardware_of(run)
    assert (begun["threads"], now["threads"]) == (threads, 3 - min(threads, 2))
    assert runs.machine_of(run).startswith(f"{threads} CPU cores") and ", then " in (
        runs.machine_of(run)
    )
    assert ", then " in runs.kind_of(run) and ", 1 thread" in runs.kind_of(run)
    _, expected = undisturbed
    ours, theirs = run.batches["loss"], expected.batches["loss"]
    assert ours[:3].tolist() == theirs[:3].tolist()
    assert ours[3] == pytest.approx(theirs[3], rel=1e-4)
    assert ours.iloc[-1] == pytest.approx(theirs.iloc[-1], rel=0.05)


KILLED = """
import json, sys, pathlib, signal, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where it was being ignored
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from conftest import small_images
from helpers import runs, training
runs.RUNS = pathlib.Path(sys.argv[2])
training.SECONDS_BETWEEN_CHECKPOINTS = 0
settings = runs.Settings(**json.loads(sys.argv[4]))
torch.set_num_threads(int(sys.argv[3]))
step = training.train_batch
training.train_batch = lambda *a: time.sleep(0.3) or step(*a)  # slow enough not to end too soon
training.train(small_images(), settings)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_leaves_a_checkpoint(
    how: signal.Signals, tiny_images: data.ImageData, undisturbed: tuple, folder: Path
) -> None:
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", KILLED, str(data.ROOT), str(folder.parent), threads]
    command.append(json.dumps(dataclasses.asdict(SMALL)))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / "checkpoint-before.pt").exists():
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)
    while process.poll() is None:  # Python loses an interrupt that comes in a destructor
        process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    assert process.returncode != 0
    with pytest.raises(RunError, match="stopped is not finished"):
        runs.read("stopped")
    assert_same_run(run_to_the_end(tiny_images), undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "code"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    damage: str,
    tiny_images: data.ImageData,
    undisturbed: tuple,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    stop_after(4, monkeypatch, tiny_images)
    latest, proof = folder / "checkpoint.pt", folder / "proof"
    if damage == "truncated":
        latest.write_bytes(latest.read_bytes()[:-1000])
    elif damage == "foreign":
        state = torch.load(latest, weights_only=True)
        torch.save(state | {"config": state["config"] | {"run": "another"}}, latest)
    else:
        torch.save(Malice(proof), latest, pickle_module=pickle)
    ours = run_to_the_end(tiny_images)
    reason = "belongs to a run another" if damage == "foreign" else "cannot be read"
    assert f"checkpoint.pt {reason}" in ours[2][0]
    assert ours[2][0].endswith("it is not used, but kept as checkpoint-unusable.pt.")
    assert (folder / "checkpoint-unusable.pt").is_file(), "what was computed is lost"
    assert "goes on after batch 3 of 5 in epoch 1" in ours[2][1]
    assert not proof.exists(), "a checkpoint has run code"
    assert_same_run(ours, undisturbed)


def test_checkpoints_for_which_there_is_no_memory_stay(
    tiny_images: data.ImageData, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 GB")

    stop_after(4, monkeypatch, tiny_images)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read now .*start the run"):
            run_to_the_end(tiny_images)
    assert (folder / "checkpoint.pt").is_file() and (folder / "checkpoint-before.pt").is_file()
    assert_same_run(run_to_the_end(tiny_images), undisturbed)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_without_any_good_checkpoint_the_run_begins_again(
    tiny_images: data.ImageData, undisturbed: tuple, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    stop_after(3, monkeypatch, tiny_images)
    for path in folder.glob("checkpoint*.pt"):
        path.write_bytes(b"")
    ours = run_to_the_end(tiny_images)
    assert sum("cannot be read" in line for line in ours[2]) == 2
    assert_same_run(ours, undisturbed)


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 3), ("learning_rate", 0.1), ("seed", 1), ("widths", [32] * 6)]
)
def test_other_parameters_than_the_run_began_with_are_refused_by_name(
    name: str, value: object, tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, monkeypatch, tiny_images)
    with pytest.raises(RunError, match=rf"begun with {name} = .*and now {name} = "):
        run_to_the_end(tiny_images, dataclasses.replace(SMALL, **{name: value}))


def test_another_process_cannot_write_the_same_run(
    tiny_images: data.ImageData, folder: Path
) -> None:
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="under way in another process"):
        run_to_the_end(tiny_images)
    run_to_the_end(tiny_images)  # and when the other is done, it can


def test_without_a_name_an_unfinished_run_is_continued_and_a_finished_one_never(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnamed = dataclasses.replace(SMALL, run="")
    monkeypatch.setattr(training, "train_and_record", lambda *_: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception):
        run_to_the_end(tiny_images, unnamed)
    assert runs.free_name("quick-seed0") == "quick-seed0"
    (runs.RUNS / "quick-seed0" / "metrics.json").write_text("{}")
    assert runs.free_name("quick-seed0") == "quick-seed0-2"


def test_a_loss_that_is_not_finite_stops_the_run_and_marks_it(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    step, factors = training.train_batch, [1.0] * 6 + [float("nan")]

    def diverge(*arguments: object) -> tuple:
        losses, right = step(*arguments)
        return losses * factors.pop(0), right

    monkeypatch.setattr(training, "train_batch", diverge)
    with pytest.raises(training.TrainingError, match="nan in epoch 2, batch 2"):
        run_to_the_end(tiny_images)
    good = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    assert all(weight.isfinite().all() for weight in good["network"].values())
    assert (good["epoch"], good["batch"]) == (2, 1)
    with pytest.raises(RunError, match=r"stopped failed.*nan in epoch 2"):
        runs.read("stopped")
    with pytest.raises(RunError, match="is there already"):
        run_to_the_end(tiny_images)


@pytest.mark.parametrize("poisoned", [4, 7, 10])  # within an epoch, and in the very last batch
def test_weights_that_are_not_finite_are_never_kept(
    poisoned: int, tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """The loss is that before the step, so the step may spoil the weights behind a good loss."""
    step, done = training.train_batch, []

    def spoil(network: torch.nn.Module, *arguments: object) -> tuple:
        result = step(network, *arguments)
        done.append(1)
        if len(done) == poisoned:
            network.output.fc[0].weight.data[0, 0] = float("inf")
        return result

    monkeypatch.setattr(training, "train_batch", spoil)
    epoch, batch = divmod(poisoned - 1, 5)
    where = f"Weights are not finite in epoch {epoch + 1}, batch {batch + 1}, at learning rate"
    with pytest.raises(training.TrainingError, match=where):
        run_to_the_end(tiny_images)
    good = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    assert all(weight.isfinite().all() for weight in good["network"].values())
    with pytest.raises(RunError, match="stopped failed"):
        runs.read("stopped")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_no_epoch(
    tiny_images: data.ImageData,
    undisturbed: tuple,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    begun: list[Callable] = []
    row = runs.Record.add_epoch

    def filled_up(record: runs.Record, *arguments: object) -> None:
        monkeypatch.setattr(runs, "sync", full_disk)
        begun.append(row)
        row(record, *arguments)

    monkeypatch.setattr(runs.Record, "add_epoch", filled_up)
    ours = run_to_the_end(tiny_images)
    assert_same_run(ours, undisturbed)
    for name in ("history.csv", "checkpoint.pt", "weights.pt"):
        sentence = f"stopped/{name} could not be written (No space left on device)"
        assert told(ours[2], sentence), name
    assert told(ours[2], "Run stopped stays unfinished: make room, and start it again.")
    assert not list(folder.glob("*.new")), "half a file takes room"
    with pytest.raises(RunError, match="stopped is not finished"):
        runs.read("stopped")


@pytest.mark.parametrize("name", ["weights.pt", "history.csv", "metrics.json"])
def test_what_could_not_be_written_at_the_end_is_written_when_there_is_room(
    name: str,
    tiny_images: data.ImageData,
    undisturbed: tuple,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    aside = runs.write_aside

    def some_fail(path: Path, *arguments: object) -> None:
        if path.name == name:
            full_disk()
        aside(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_aside", some_fail)
        assert_same_run(run_to_the_end(tiny_images), undisturbed)
    assert not (folder / "metrics.json").exists()
    ours = run_to_the_end(tiny_images)
    assert ours[2][0] == "run stopped goes on after its last epoch"
    assert_same_run(ours, undisturbed)
    written = torch.load(folder / "weights.pt", weights_only=True)
    for key, tensor in undisturbed[0].state_dict().items():
        assert torch.equal(written[key], tensor), key


def test_a_folder_that_cannot_be_made_is_named(
    tiny_images: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(runs, "RUNS", tmp_path / "file")
    with pytest.raises(RunError, match="file/stopped cannot be written: Not a directory"):
        run_to_the_end(tiny_images)


@pytest.mark.parametrize(
    ("writing", "fault"),
    [("mkdir", errno.EACCES), ("mkdir", errno.EROFS), ("sync", errno.ENOSPC)],
)
def test_a_run_that_cannot_be_recorded_stops_before_it_trains(
    writing: str, fault: int, tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(*(Path, "mkdir") if writing == "mkdir" else (runs, "sync"), refuse)
    monkeypatch.setattr(training, "train_batch", lambda *_: pytest.fail("it trains"))
    with pytest.raises(RunError, match=f"stopped cannot be written: {os.strerror(fault)}; make"):
        run_to_the_end(tiny_images)


def test_a_record_of_a_later_version_is_refused_by_name(
    tiny_images: data.ImageData, folder: Path
) -> None:
    run_to_the_end(tiny_images)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"version": runs.VERSION + 1}))
    with pytest.raises(RunError, match="stopped has a record of version"):
        runs.read("stopped")
    del config["version"]  # as the first records had it
    (folder / "config.json").write_text(json.dumps(config))
    assert runs.read("stopped").metrics["epochs"] == 2
