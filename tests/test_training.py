"""Training: exact steps, and runs that end with the same bits however they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from helpers import data, project, runs, training
from helpers.data import ImageData
from helpers.project import ProjectError
from helpers.runs import RunError
from helpers.settings import Settings
from helpers.training import Muon, infobatch_weights, make_optimizers, orthogonal, train

ROWS = [
    {"channels": 8, "kernels": [3, 1], "pool": True},
    {"channels": 8, "kernels": [3, 1], "residual": True},
]
# 160 images make five batches; everything that draws random numbers is on.
GIVEN: dict[str, Any] = {
    "blocks": ROWS, "stem_filters": 12, "epochs": 3, "first_sizes": [16], "batch_size": 32,
    "device": "cpu", "skip_easy": 0.5, "cutout": 8, "run": "tried",
}  # fmt: skip
SETTINGS = Settings(**GIVEN)


def silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def undisturbed(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project, "RUNS", tmp_path_factory.mktemp("runs"))
        _, run = train(images, SETTINGS, silent)
        yield run


def assert_same_bits(folder: Path, other: Path) -> None:
    one, two = (torch.load(path / "weights.pt", weights_only=True) for path in (folder, other))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert (folder / "batches.csv").read_bytes() == (other / "batches.csv").read_bytes()
    tables = [pd.read_csv(path / "history.csv").drop(columns="seconds") for path in (folder, other)]
    assert tables[0].equals(tables[1])


def test_the_record_says_what_happened(undisturbed: runs.Run, images: ImageData) -> None:
    history, batches = undisturbed.history, undisturbed.batches
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["size"].tolist() == [16, 32, 32]
    assert undisturbed.metrics["test_accuracy"] == history["test_accuracy"].iloc[-1]
    assert (history["test_accuracy"] * 70 % 1).round(9).isin([0, 1]).all()  # counts, not means
    assert batches["learning_rate"].is_monotonic_decreasing
    assert batches["learning_rate"].iloc[0] == SETTINGS.learning_rate
    assert batches["learning_rate"].iloc[-1] < SETTINGS.learning_rate / 10  # one schedule, ended
    assert (batches.groupby("epoch").size() <= 5).all()
    assert runs.read_json(undisturbed.folder / "config.json")["dataset"] == "stand-in"


def test_the_kept_weights_have_the_stated_accuracy(
    undisturbed: runs.Run, images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "RUNS", undisturbed.folder.parent)
    network = runs.load_network(runs.read("tried"))
    logits = training.evaluation.predict(network, images.test)
    stated = undisturbed.metrics["test_accuracy"]
    assert training.evaluation.accuracy(logits, images.test.labels) == stated


def test_a_finished_run_is_read_and_not_trained_again(
    undisturbed: runs.Run, images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(project, "RUNS", undisturbed.folder.parent)
    monkeypatch.setattr(training, "train_step", None)
    said: list[str] = []
    _, run = train(images, SETTINGS, said.append)
    assert run.metrics == undisturbed.metrics
    assert len(said) == 1 + 3
    with pytest.raises(RunError, match="epochs"):
        train(images, Settings(**GIVEN | {"epochs": 4}), silent)


@pytest.mark.parametrize("steps", [1, 7, 11])
def test_an_interrupted_run_ends_with_the_same_bits(
    steps: int, undisturbed: runs.Run, images: ImageData, records: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    done, step = [], training.train_step

    def interrupted(network: torch.nn.Module, *arguments: object) -> tuple[Tensor, Tensor]:
        if len(done) == steps:
            next(network.parameters()).data.zero_()  # half a step leaves the weights anyhow
            raise KeyboardInterrupt
        done.append(1)
        return step(network, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(images, SETTINGS, silent)
    torch.rand(3)  # other draws in between change nothing
    _, run = train(images, SETTINGS, silent)
    assert run.metrics["interruptions"] == 1
    assert_same_bits(run.folder, undisturbed.folder)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    undisturbed: runs.Run, images: ImageData, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(training, "epoch_line", lambda *_: 1 / 0)  # stops after the first epoch
        with pytest.raises(ZeroDivisionError):
            train(images, SETTINGS, silent)
    (records / "tried" / "checkpoint.pt").write_bytes(b"cut")
    said: list[str] = []
    _, run = train(images, SETTINGS, said.append)
    assert any("checkpoint.pt is not used" in line for line in said)
    assert (records / "tried" / "checkpoint-bad.pt").is_file()
    assert_same_bits(run.folder, undisturbed.folder)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from conftest import make_images
from test_training import SETTINGS
from helpers import project, training
project.RUNS, training.SECONDS_BETWEEN_CHECKPOINTS = Path(sys.argv[3]), 0
training.train(make_images(), SETTINGS)
"""


def test_a_killed_run_ends_with_the_same_bits(
    undisturbed: runs.Run, images: ImageData, records: Path
) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(project.ROOT), str(here), str(records)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (records / "tried" / "checkpoint.pt").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, run = train(images, SETTINGS, silent)
    assert run.metrics["interruptions"] == 1
    assert_same_bits(run.folder, undisturbed.folder)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_sentence(
    images: ImageData, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = torch.full((32,), torch.nan)
    monkeypatch.setattr(training, "train_step", lambda *_: (nan, nan > 0))
    with pytest.raises(ProjectError, match="epoch 1, batch 1"):
        train(images, SETTINGS, silent)


def test_a_full_disk_is_said_and_the_training_goes_on(
    undisturbed: runs.Run, images: ImageData, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("helpers.runs.torch.save", full)
        with pytest.raises(OSError, match="No space"):  # the weights at the end are not lost:
            train(images, SETTINGS, said.append)
    assert any("could not be written" in line for line in said)
    _, run = train(images, SETTINGS, silent)
    assert_same_bits(run.folder, undisturbed.folder)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(RuntimeError("can't allocate memory: 9 bytes"), RunError), (MemoryError(), RunError),
     (RuntimeError("CUDA error: an illegal memory access"), RuntimeError)],
)  # fmt: skip
def test_too_little_memory_is_said_in_a_sentence(
    raised: Exception, seen: type, images: ImageData, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise raised

    monkeypatch.setattr(training, "train_step", full)
    with pytest.raises(seen, match="memory") as error:
        train(images, SETTINGS, silent)
    assert type(error.value) is seen


def test_muon_steps_along_the_orthogonal_factor() -> None:
    torch.manual_seed(0)
    for shape in ((8, 30), (30, 8)):
        matrix = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert (values > 0.3).all()
        assert (values < 1.3).all()
        projected = (u.mT @ orthogonal(matrix) @ vh.mT).diagonal()
        assert torch.allclose(projected.sort(descending=True).values, values, atol=1e-4)


def test_muon_keeps_banks_at_their_norm_and_moves_by_its_rate() -> None:
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Muon([kernel], lr=0.1, momentum=0.5)
    kernel.grad = torch.randn_like(kernel)
    before = kernel.detach() * (8**0.5 / kernel.detach().norm())
    optimizer.step()
    step = (before - kernel.detach()) / 0.1
    assert torch.linalg.svdvals(step.flatten(1)).min() > 0.3
    direction = (1.5 * kernel.grad).flatten(1)  # Nesterov's, first step
    assert torch.allclose(step.flatten(1), orthogonal(direction), atol=1e-5)


def test_every_parameter_has_one_optimizer_and_gates_their_own_rate() -> None:
    network = Settings(**GIVEN).network()
    optimizers = make_optimizers(network, SETTINGS)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert [group["lr"] for group in groups] == [0.07, 0.014, 0.0003]


def test_infobatch_keeps_the_expected_weight_and_drops_easy_images_only() -> None:
    losses = torch.cat([torch.zeros(4000), torch.ones(4000), torch.full((100,), torch.nan)])
    weights = infobatch_weights(losses, 0.5, torch.Generator().manual_seed(0))
    assert set(weights[:4000].tolist()) == {0.0, 2.0}
    assert weights[:4000].mean() == pytest.approx(1, abs=0.05)
    assert (weights[4000:] == 1).all()


def test_batch_norm_is_recalibrated_on_images_augmented_as_in_training(images: ImageData) -> None:
    network = training.initial_network(images.train, SETTINGS)
    training.recalibrate(network, images.train, SETTINGS)
    generator = torch.Generator().manual_seed(SETTINGS.seed)
    augmentation = training.Augmentation(160, generator, SETTINGS)
    ((x, *_),) = data.training_loader(images.train, 160, augmentation, generator)
    with torch.no_grad():
        y = network.between[0].pool(network.blocks[0](network.stem(x)))
    assert torch.allclose(network.between[0].norm.running_mean, y.mean(dim=(0, 2, 3)), atol=1e-5)


def test_first_weights_pass_x_on_and_branches_differ(images: ImageData) -> None:
    one, other = (training.initial_network(images.train, SETTINGS) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    three, single = (C.weight.detach() for C in one.blocks[1].branches)
    assert three[range(8), range(8), 1, 1].mean() == pytest.approx(1, abs=0.15)
    assert not torch.allclose(three[..., 1, 1], single[..., 0, 0])


def test_the_transient_line_is_shown_to_a_terminal_only(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    training.show_progress("batch 1")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    training.show_progress("batch 1")
    assert capsys.readouterr().out.startswith("\r")


def test_float16_scales_its_gradients(images: ImageData) -> None:
    """On a CPU, with the scaler that a GPU without bfloat16 gets."""
    network = training.initial_network(images.train, SETTINGS)
    optimizers = make_optimizers(network, SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = network.output.fc.weight.clone()
    x, labels = data.normalise(images.train.images[:32]), images.train.labels[:32]
    step = (network, optimizers, scaler, torch.float16, 0.1, x, labels, torch.ones(32))
    losses, hits = training.train_step(*step)
    assert losses.isfinite().all()
    assert hits.shape == (32,)
    assert not torch.equal(before, network.output.fc.weight)
    gate = network.blocks[0].fc.weight.grad
    assert gate.abs().max() < 10  # unscaled before the step
