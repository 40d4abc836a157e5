"""On a GPU, where there is one: the same function, the same training, without waiting.

What needs no GPU of it, such as when a step is recorded, is tested everywhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import small_images
from torch import Tensor, nn

from helpers import data, evaluation, runs, training
from helpers.model import FORMS, IntermediateBlock
from helpers.runs import Settings

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# 160 images make five batches.
SMALL = Settings(
    widths=[8] * 6, stem_filters=12, epochs=3, first_sizes=[16], batch_size=32, run="small",
    precision="float32", trivial_augment=0.5, cutout=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def train(**changed: object) -> tuple[nn.Module, runs.Run]:
    settings = Settings(**{**vars(SMALL), **changed})
    return training.train(small_images(), settings, report=lambda line: None)


# ---- everywhere


class OnTheCpu(training.Replayed):
    """Records by remembering what it was given, and replays by doing the step with that."""

    def __init__(self, step: object, network: nn.Module) -> None:
        self.done: list[str] = []
        super().__init__(step, network, stream=None)

    def aside(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.done.append("aside")
        return self.step(*inputs)

    def record(self, *inputs: Tensor) -> tuple:
        self.done.append("record")
        own = [torch.zeros_like(x) for x in inputs]
        outputs = tuple(torch.zeros_like(x) for x in self.step(*own))

        class Graph:
            def replay(graph) -> None:
                self.done.append("replay")
                for output, value in zip(outputs, self.step(*own), strict=True):
                    output.copy_(value)

        return Graph(), own, outputs


def test_a_step_is_recorded_once_for_each_shape_and_temperature() -> None:
    network = SMALL.network()
    replayed = OnTheCpu(lambda x: (2 * x,), network)
    kept = [replayed(torch.full((4,), float(value))) for value in range(6)]
    assert [float(output[0]) for (output,) in kept] == [0, 2, 4, 6, 8, 10]  # none overwritten
    assert replayed.done == ["aside"] * 3 + ["record"] + ["replay"] * 3
    replayed(torch.zeros(5))
    network.blocks[0].temperature = 2.0
    replayed(torch.zeros(4))
    assert replayed.done[7:] == ["aside"] * 2
    assert not replayed.recordings, "those of another temperature would only keep memory"


def test_full_batches_are_all_of_one_size() -> None:
    for n, size, count in ((10, 3, 3), (9, 3, 3), (2, 3, 1)):
        generator = torch.Generator().manual_seed(0)
        batches = list(data.EvenBatches(torch.arange(n), size, generator, full=True))
        assert [len(batch) for batch in batches] == [min(n, size)] * count
        numbers = [number for batch in batches for number in batch]
        assert len(set(numbers)) == len(numbers) == min(n, size) * count


def test_losses_are_read_late_and_none_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCHES_READ_AT_ONCE", 3)
    images = small_images().train
    underway = training.Underway(training.first_network(images, SMALL), images, SMALL)
    underway.device = torch.device("cuda")  # as if
    for batch, index in enumerate(torch.arange(160).split(32)):
        underway.note(index, torch.full((32,), float(batch)), torch.ones(32) > 0, 0.1)
        assert underway.batch == 3 * ((batch + 1) // 3)
    underway.read_pending()
    assert [row["loss"] for row in underway.rows] == [0, 1, 2, 3, 4]
    assert underway.right == underway.seen == 160 and not underway.pending
    assert underway.losses.tolist() == [float(number // 32) for number in range(160)]
    underway.note(torch.arange(32), torch.full((32,), float("nan")), torch.ones(32) > 0, 0.1)
    with pytest.raises(training.TrainingError, match="The loss is nan"):
        underway.read_pending()


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("kernels", [(3, 3, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "compiled"])
def test_every_form_equals_the_formula_there(form: str, kernels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block = IntermediateBlock(8, 16, len(kernels), kernels, form="branches").double()
    nn.init.normal_(block.fc.weight)
    x = torch.randn(5, 8, 12, 12, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(5, 16, 12, 12, dtype=torch.float64)

    def gradients(block: IntermediateBlock, x: Tensor) -> list[Tensor]:
        x_new = block(x)
        parameters = list(block.parameters())
        return [x_new, *torch.autograd.grad((x_new * pull.to(x)).sum(), [x, *parameters])]

    expected = gradients(block, x)
    there = IntermediateBlock(8, 16, len(kernels), kernels, form=form).double()
    there.load_state_dict(block.state_dict())
    measured = gradients(there.cuda(), x.detach().cuda().requires_grad_())
    for ours, theirs in zip(measured, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-9)


@needs_gpu
def test_a_replayed_training_equals_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon, Adam, falling learning rates, statistics; to rounding, since sums have no order."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network, run = train(run="replayed", device="cuda")
    monkeypatch.setattr(training.Replayed, "CALL_BY_CALL", 10**9)
    other, expected = train(run="called", device="cuda")
    assert run.batches["loss"].tolist() == pytest.approx(
        expected.batches["loss"].tolist(), rel=0.02
    )
    images = small_images().test
    ours, theirs = (evaluation.predict(n, images, "cuda") for n in (network, other))
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


@needs_gpu
def test_the_same_is_learnt_as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    _, run = train(run="there", device="cuda")
    _, expected = train(run="here", device="cpu")
    ours, theirs = run.batches["loss"], expected.batches["loss"]
    assert ours[:5].tolist() == pytest.approx(theirs[:5].tolist(), rel=0.01)
    assert run.metrics["hardware"]["gpu"] == torch.cuda.get_device_name()


@needs_gpu
def test_bfloat16_learns_and_the_kept_weights_give_its_accuracy() -> None:
    network, run = train(device="cuda", precision="bfloat16", epochs=8)
    assert run.batches["loss"].iloc[-1] < run.batches["loss"].iloc[0]
    kept = runs.load_network(runs.read(run.name))
    images = small_images().test
    here = evaluation.accuracy(evaluation.predict(kept, images, "cpu"), images.labels)
    assert here == run.metrics["test_accuracy"]


@needs_gpu
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_run_goes_on_on_another_device(
    first: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(runs, "pick_device", lambda name: torch.device(first))
    monkeypatch.setattr(training, "pick_device", lambda name: torch.device(first))
    measure = training.measure

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train()
    monkeypatch.setattr(training, "measure", measure)
    monkeypatch.setattr(training, "pick_device", lambda name: torch.device(then))
    _, run = train()
    assert run.metrics["interruptions"] == 1 and run.metrics["hardware"]["device"] == then
    assert len(run.batches) == 15


@needs_gpu
def test_an_epoch_waits_for_the_gpu_only_to_read_losses() -> None:
    images = small_images().train.to("cuda")
    network = training.first_network(images, SMALL).cuda()
    underway = training.Underway(network, images, SMALL)
    for _ in range(2):  # the steps that are recorded
        training.train_epoch(underway, lambda: None)
        underway.begin_epoch(underway.epoch + 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, labels, index in underway.batches():
            training.set_learning_rate(underway.optimizers, 1, 2)
            weights = underway.importance[index].to(x.device, non_blocking=True)
            underway.step(training.shrink(x, 32), labels, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
