"""The loop does what the report says of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import data, evaluation, model, runs, training
from helpers.runs import Settings

SMALL = Settings(
    widths=[8, 8],
    pool_after=[1],
    stem_filters=12,
    branches=2,
    epochs=3,
    first_sizes=[],
    batch_size=32,
    device="cpu",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def quiet(images: data.ImageData, settings: Settings) -> tuple[torch.nn.Module, runs.Run]:
    return training.train(images, settings, report=lambda line: None)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    tiny_images: data.ImageData,
) -> None:
    network, run = quiet(tiny_images, SMALL)
    torch.randn(17)  # somebody else draws from the global generator
    again, second = quiet(tiny_images, SMALL)
    other, third = quiet(tiny_images, dataclasses.replace(SMALL, seed=1))
    assert run.batches["loss"].tolist() == second.batches["loss"].tolist()
    for ours, theirs in zip(network.parameters(), again.parameters()):
        assert torch.equal(ours, theirs)
    assert run.batches["loss"].tolist() != third.batches["loss"].tolist()


@pytest.mark.parametrize(
    "changed",
    [
        {"translate": 0}, {"flip": False}, {"cutout": 8}, {"trivial_augment": 1.0},
        {"label_smoothing": 0.0}, {"momentum": 0.5}, {"learning_rate": 0.01},
        {"adam_learning_rate": 0.001}, {"skip_easy": 0.8},
    ],
    ids=str,
)  # fmt: skip
def test_every_parameter_of_the_training_reaches_it(
    changed: dict, tiny_images: data.ImageData
) -> None:
    before, after = (
        quiet(tiny_images, dataclasses.replace(SMALL, run=name, **more))[1]
        for name, more in (("before", {}), ("after", changed))
    )
    losses = before.batches["loss"].tolist(), after.batches["loss"].tolist()
    assert losses[0] != losses[1]


def test_every_epoch_has_its_own_number(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which every image is mirrored in every second one."""
    seen, set_epoch = [], training.set_epoch
    monkeypatch.setattr(
        training, "set_epoch", lambda loader, epoch, numbers: (
            seen.append(epoch), set_epoch(loader, epoch, numbers)
        )
    )  # fmt: skip
    quiet(tiny_images, SMALL)
    assert seen[:3] == [0, 1, 2]


def test_the_last_metrics_are_those_of_the_whole_run(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    views, predict = [], evaluation.predict
    monkeypatch.setattr(
        evaluation, "predict", lambda *given, **more: (
            views.append(given[3] if len(given) > 3 else None), predict(*given, **more)
        )[1]
    )  # fmt: skip
    network, run = quiet(tiny_images, SMALL)
    with_tta = predict(network, tiny_images.test, views=evaluation.TTA)
    assert run.metrics["test_accuracy_tta"] == evaluation.accuracy(
        with_tta, tiny_images.test.labels
    )
    assert views[-1] is evaluation.TTA
    assert run.metrics["train_seconds"] == pytest.approx(run.history["seconds"].sum())
    learned = [p for p in network.parameters() if p.requires_grad]
    assert run.metrics["parameters"] == sum(p.numel() for p in learned)


def test_measuring_more_often_does_not_change_the_training(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = quiet(tiny_images, SMALL)
    step = training.train_batch

    def measure_after_every_batch(network: torch.nn.Module, *arguments: object) -> tuple:
        done = step(network, *arguments)
        evaluation.predict(network, tiny_images.test)
        return done

    monkeypatch.setattr(training, "train_batch", measure_after_every_batch)
    _, measured = quiet(tiny_images, SMALL)
    assert measured.batches["loss"].tolist() == run.batches["loss"].tolist()


def test_a_run_can_go_on_from_the_weights_of_another(tiny_images: data.ImageData) -> None:
    first, earlier = quiet(tiny_images, dataclasses.replace(SMALL, run="earlier"))
    settings = dataclasses.replace(SMALL, run="later", start_from="earlier", epochs=1)
    begun = training.earlier_network(settings, tiny_images)
    for ours, theirs in zip(begun.state_dict().values(), first.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    _, later = quiet(tiny_images, settings)
    assert later.batches["loss"].iloc[0] < earlier.batches["loss"].iloc[0]
    assert later.batches["learning_rate"].iloc[0] == settings.learning_rate
    seconds = [run.metrics["train_seconds"] for run in (earlier, later)]
    assert runs.training_seconds(earlier) == seconds[0]
    assert runs.training_seconds(later) == sum(seconds)
    assert runs.seeds_of(later)["train_seconds"].tolist() == [sum(seconds)]
    work = [runs.training_work(run) for run in (earlier, later)]
    assert work[1] == pytest.approx(work[0] * 4 / 3)  # three epochs, and then one more
    whole = runs.whole_training(later)
    assert whole.history["epoch"].tolist() == [1, 2, 3, 4]
    assert whole.history["loss"].tolist() == [*earlier.history["loss"], *later.history["loss"]]
    assert whole.batches["epoch"].drop_duplicates().tolist() == [1, 2, 3, 4]
    assert runs.image_sizes(later) == [32] * 4
    assert runs.restarts(later) == [4] and runs.restarts(earlier) == []


def test_each_seed_goes_on_from_the_run_of_its_own(tiny_images: data.ImageData) -> None:
    began = {}
    for seed in (0, 1):
        settings = dataclasses.replace(SMALL, seed=seed, epochs=1, run=f"first-seed{seed}")
        began[seed], _ = quiet(tiny_images, settings)
    then = [
        quiet(tiny_images, dataclasses.replace(SMALL, seed=seed, start_from=start, run=f"{seed}"))
        for seed, start in ((0, "first"), (1, "first-seed1"))
    ]
    assert [[one.name for one in runs.lineage(run)] for _, run in then] == [
        ["first-seed0", "0"], ["first-seed1", "1"],
    ]  # fmt: skip
    assert runs.seeds_of(then[0][1])["seed"].tolist() == [0, 1]
    settings = dataclasses.replace(SMALL, seed=1, start_from="first")
    network = training.earlier_network(settings, tiny_images)
    for ours, theirs in zip(network.parameters(), began[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"widths": [8, 4]}, r"its widths is \[8, 8\], and here it is \[8, 4\]"),
        ({"gate": "sigmoid"}, "its gate is 'softmax'"),
        ({"validation": 16}, "its validation is 0, and here it is 16"),
    ],
)
def test_a_run_does_not_go_on_from_what_does_not_fit(
    changed: dict, said: str, tiny_images: data.ImageData
) -> None:
    quiet(tiny_images, dataclasses.replace(SMALL, run="earlier", epochs=1))
    settings = dataclasses.replace(SMALL, run="later", start_from="earlier", **changed)
    with pytest.raises(runs.ParameterError, match=f"start_from = 'earlier': {said}"):
        quiet(tiny_images, settings)
    real = dataclasses.replace(tiny_images, name="cifar10")
    with pytest.raises(runs.RunError, match="trained on stand-in, and the data here is"):
        training.earlier_network(dataclasses.replace(SMALL, start_from="earlier"), real)
    with pytest.raises(runs.RunError, match=r"'nothing': .* \(there are: earlier\)"):
        quiet(tiny_images, dataclasses.replace(SMALL, run="later", start_from="nothing"))
    assert runs.names() == ["earlier"] and not (runs.RUNS / "later").exists()


def test_all_clean_training_images_are_measured_as_often_as_asked(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every second epoch and the last, and some of them in between; the training itself does
    not notice."""
    measured, measure = [], training.measure

    def noted(network: torch.nn.Module, images: data.ImageSet, *rest: object) -> dict[str, float]:
        measured.append(len(images))
        return measure(network, images, *rest)

    monkeypatch.setattr(training, "measure", noted)
    monkeypatch.setattr(training, "IMAGES_IN_BETWEEN", 50)
    _, often = quiet(tiny_images, SMALL)
    _, seldom = quiet(tiny_images, dataclasses.replace(SMALL, measure_training_every=2))
    every = len(tiny_images.train)
    assert measured == [every, every, every, 50, every, every]
    assert seldom.history["training_accuracy"].notna().all()
    same = ["loss", "test_accuracy"]
    assert often.history[same].equals(seldom.history[same])
    assert often.metrics["training_accuracy"] == seldom.metrics["training_accuracy"]


def test_no_thread_calculates_with_denormal_numbers(
    run_python: Callable[..., subprocess.CompletedProcess],
) -> None:
    """Which a thread that was there before would go on with."""
    process = run_python(
        "-c",
        "import torch; torch.set_num_threads(2)\n"
        "from helpers import data\n"
        "torch.rand(2**22, 2).t().contiguous()\n"
        "from helpers import training\n"
        "print(int((torch.full((2**22,), 1e-39) * 1).count_nonzero()))",
        project=data.ROOT,
        cwd=data.ROOT,
    )
    assert process.stdout.strip() == "0", process.stderr


def test_weights_that_half_precision_cannot_hold_end_the_run(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded after the last epoch, they would be infinite; the record says so, and why."""

    def grow(network: torch.nn.Module, *_: object) -> float:
        next(network.buffers()).fill_(1e6)
        return 0.0

    monkeypatch.setattr(training, "settle_statistics", grow)
    with pytest.raises(training.TrainingError, match="Weights are not finite in epoch 3"):
        quiet(tiny_images, dataclasses.replace(SMALL, run="grown"))
    assert "not finite" in runs.read_json(runs.RUNS / "grown" / "failed.json")["failed"]


def test_gates_are_warm_at_first_and_their_entropy_is_recorded(
    tiny_images: data.ImageData,
) -> None:
    settings = dataclasses.replace(SMALL, epochs=4, adam_learning_rate=0.5)
    _, cold = quiet(tiny_images, settings)
    network, warm = quiet(tiny_images, dataclasses.replace(settings, temperature=1000.0))
    columns = ["entropy_B1", "entropy_B2"]
    assert (warm.history.loc[0, columns] > cold.history.loc[0, columns]).all()
    assert warm.history.loc[0, columns].min() > 0.999
    assert [block.temperature for block in network.blocks] == [1.0, 1.0]
    a = evaluation.gates(network, tiny_images.test)
    measured = [float(evaluation.entropy(block).mean()) for block in a]
    assert warm.history[columns].iloc[-1].tolist() == pytest.approx(measured)


def test_the_kept_weights_are_those_that_were_measured(tiny_images: data.ImageData) -> None:
    network, run = quiet(tiny_images, SMALL)
    kept = torch.load(run.folder / "weights.pt", weights_only=True)
    for name, value in network.state_dict().items():
        assert kept[name].dtype == (torch.float16 if value.is_floating_point() else value.dtype)
        assert torch.equal(kept[name].to(value.dtype), value), name
    ours, loaded = (
        evaluation.predict(one, tiny_images.test) for one in (network, runs.load_network(run))
    )
    assert torch.equal(ours, loaded)


def test_the_last_statistics_are_those_of_clean_whole_images(
    tiny_images: data.ImageData,
) -> None:
    """Though the network learnt from covered ones, half their size but for the last epoch."""
    settings = dataclasses.replace(SMALL, epochs=2, first_sizes=[16], cutout=12)
    network, run = quiet(tiny_images, settings)
    norm = network.between[0][1]
    assert isinstance(norm, model.BatchNorm)
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    evaluation.predict(network, tiny_images.train)
    maps = torch.cat(seen)
    torch.testing.assert_close(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(norm.running_var, maps.var(dim=(0, 2, 3)), atol=2e-3, rtol=2e-3)
    assert norm.momentum == 0.4  # as before


def test_the_last_statistics_can_be_those_of_augmented_images(tiny_images: data.ImageData) -> None:
    """Of images altered as the run alters them: drawn from its seed, not from what it has drawn."""
    settings = dataclasses.replace(SMALL, cutout=16, statistics="augmented images", seed=5)
    network = training.first_network(tiny_images.train, SMALL)
    training.settle_statistics(network, tiny_images.train, SMALL)
    norm = network.between[0][1]
    clean = norm.running_mean.clone()
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    training.settle_statistics(network, tiny_images.train, settings)
    handle.remove()
    maps = torch.cat(seen)
    torch.testing.assert_close(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=2e-4, rtol=2e-4)
    assert not torch.allclose(norm.running_mean, clean, atol=1e-3)
    augmented = norm.running_mean.clone()
    torch.randn(9)
    training.settle_statistics(network, tiny_images.train, settings)
    assert torch.equal(norm.running_mean, augmented)


def test_running_statistics_stay_as_they_are(tiny_images: data.ImageData) -> None:
    network = training.first_network(tiny_images.train, SMALL)
    before = network.between[0][1].running_mean.clone()
    running = dataclasses.replace(SMALL, statistics="running")
    assert training.settle_statistics(network, tiny_images.train, running) == 0
    assert torch.equal(network.between[0][1].running_mean, before)


def test_no_batch_of_the_last_statistics_is_smaller_than_the_others(
    tiny_images: data.ImageData,
) -> None:
    """All batches have the same weight, so that a ragged one would count for too much."""
    index = torch.arange(501) % (len(tiny_images.train) - 1)
    index[-1] = len(tiny_images.train) - 1
    network = training.first_network(tiny_images.train, SMALL)
    training.settle_statistics(network, tiny_images.train.subset(index), SMALL)
    left_out = network.between[0][1].running_mean.clone()
    training.settle_statistics(network, tiny_images.train.subset(index[:-1]), SMALL)
    assert torch.equal(left_out, network.between[0][1].running_mean)


def test_training_leaves_the_global_generator_alone(tiny_images: data.ImageData) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet(tiny_images, SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_the_record_holds_every_batch_and_exact_accuracies(tiny_images: data.ImageData) -> None:
    lines: list[str] = []
    settings = dataclasses.replace(SMALL, validation=20)
    network, run = training.train(tiny_images, settings, report=lines.append)
    batches = -(-(len(tiny_images.train) - 20) // 32)  # as few as there can be
    assert (len(tiny_images.train) - 20) % 32
    assert run.batches.groupby("epoch").size().tolist() == [batches] * 3
    assert run.history["epoch"].tolist() == [1, 2, 3]
    test = evaluation.accuracy(
        evaluation.predict(network, tiny_images.test), tiny_images.test.labels
    )
    assert run.metrics["test_accuracy"] == test == run.history["test_accuracy"].iloc[-1]
    kept, held_out = runs.training_parts(tiny_images, settings)
    for name, part in (("training_accuracy", kept), ("validation_accuracy", held_out)):
        exact = evaluation.accuracy(evaluation.predict(network, part), part.labels)
        assert run.metrics[name] == exact
    assert run.history["training_accuracy"].notna().all()
    assert len(lines) == 3 and "test" in lines[0] and "left" in lines[0]
    loaded = evaluation.predict(runs.load_network(run), tiny_images.test)
    assert evaluation.accuracy(loaded, tiny_images.test.labels) == test


def test_running_accuracy_and_loss_are_of_images_not_of_batches(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_as_large_as_the_batch(network: object, x: torch.Tensor, *others: object) -> tuple:
        return torch.full((len(x),), float(len(x))), torch.arange(len(x)) == 0

    monkeypatch.setattr(training, "train_batch", losses_as_large_as_the_batch)
    settings = dataclasses.replace(SMALL, batch_size=60, epochs=1)  # 160 images: 54, 53, 53
    _, run = quiet(tiny_images, settings)
    row = run.history.iloc[0]
    assert row["training_accuracy_running"] == 3 / 160
    assert row["loss"] == pytest.approx((54 * 54 + 2 * 53 * 53) / 160)


def test_a_batch_is_one_step_on_the_smoothed_cross_entropy(tiny_images: data.ImageData) -> None:
    network = training.first_network(tiny_images.train, SMALL)
    x = data.normalise(tiny_images.train.images[:32])
    labels = tiny_images.train.labels[:32]
    logits = network(x)
    expected = -(
        0.9 * logits.log_softmax(1)[range(32), labels] + 0.1 * logits.log_softmax(1).mean(1)
    )
    hits = logits.argmax(1) == labels
    optimizers = training.make_optimizers(network, SMALL)
    before = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    weights = torch.arange(32) / 16
    (weights @ expected / weights.sum()).backward(inputs=list(network.output.parameters()))
    gradient = network.output.fc[0].weight.grad.clone()
    losses, right = training.train_batch(network, x, labels, weights, optimizers, smoothing=0.1)
    torch.testing.assert_close(losses, expected.detach())
    assert torch.equal(right, hits)
    torch.testing.assert_close(network.output.fc[0].weight.grad, gradient)
    after = [p for p in network.parameters() if p.requires_grad]
    moved = [not torch.equal(old, new) for old, new in zip(before, after)]
    # The gates move too: they would not, if all branches of a block began alike.
    assert all(moved)


def test_a_small_batch_is_learnt_to_zero_loss(tiny_images: data.ImageData) -> None:
    wider = dataclasses.replace(SMALL, widths=[16, 32])
    network = training.first_network(tiny_images.train, wider)
    network.train()
    optimizers = training.make_optimizers(network, wider)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 3, 32, 32, generator=generator)  # nothing to generalise: pure memory
    labels = torch.arange(16) % 10
    losses = []
    for step in range(150):
        training.set_learning_rate(optimizers, step, 150)
        step_losses, _ = training.train_batch(network, x, labels, torch.ones(16), optimizers, 0.0)
        losses.append(step_losses.mean())
    assert losses[0] > 1.5
    assert losses[-1] < 0.02


def test_every_parameter_is_in_one_optimizer(tiny_images: data.ImageData) -> None:
    network = training.first_network(tiny_images.train, SMALL)
    muon, adam = training.make_optimizers(network, SMALL)
    muons = [id(p) for group in muon.param_groups for p in group["params"]]
    adams = [id(p) for group in adam.param_groups for p in group["params"]]
    learning = [id(p) for p in network.parameters() if p.requires_grad]
    assert sorted(muons + adams) == sorted(learning)
    kernels = {id(c.weight) for block in network.blocks for c in block.branches}
    assert set(muons) == kernels


def test_the_schedule_ends_where_the_run_ends(tiny_images: data.ImageData) -> None:
    _, run = quiet(tiny_images, SMALL)
    rates = run.batches["learning_rate"]
    assert rates.iloc[0] == pytest.approx(SMALL.learning_rate)
    assert rates.iloc[-1] == pytest.approx(SMALL.learning_rate / len(rates))
    assert rates.is_monotonic_decreasing
    assert rates.diff().dropna().std() < 1e-9  # a straight line


def test_the_first_epochs_see_small_images_and_the_others_whole_ones(
    tiny_images: data.ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, sizes = training.train_batch, []

    def note_the_size(network: torch.nn.Module, x: torch.Tensor, *arguments: object) -> tuple:
        sizes.append(tuple(x.shape[2:]))
        return step(network, x, *arguments)

    monkeypatch.setattr(training, "train_batch", note_the_size)
    lines: list[str] = []
    settings = dataclasses.replace(SMALL, first_sizes=[16, 24])
    training.train(tiny_images, settings, report=lines.append)
    assert sizes == [(16, 16)] * 5 + [(24, 24)] * 5 + [(32, 32)] * 5
    assert len(lines) == 3
    for size, line in zip((16, 24, 32), lines):
        assert f"{size}×{size}" in line


def test_easy_images_left_out_of_an_epoch_are_made_up_for_by_the_others() -> None:
    losses = torch.tensor([0.1, 0.2, 0.3, 9.0]).repeat(5000)  # three in four below the mean
    counts = training.importance(losses, 0.6, torch.Generator().manual_seed(0))
    easy = losses < 1
    assert (counts[~easy] == 1).all()
    torch.testing.assert_close(counts[easy].unique(), torch.tensor([0.0, 2.5]))
    assert (counts[easy] == 0).float().mean() == pytest.approx(0.6, abs=0.02)
    assert counts.mean() == pytest.approx(1.0, abs=0.02)


def test_images_not_seen_yet_are_not_the_easy_ones() -> None:
    losses = torch.tensor([0.1, 9.0, math.nan]).repeat(50)
    counts = training.importance(losses, 0.6, torch.Generator().manual_seed(0))
    assert (counts[losses.isnan()] == 1).all() and (counts == 0).any()


def test_an_epoch_without_easy_images_is_shorter_and_the_last_ones_see_all(
    tiny_images: data.ImageData,
) -> None:
    settings = dataclasses.replace(SMALL, epochs=8, skip_easy=0.8)
    _, run = quiet(tiny_images, settings)
    images = (run.history["images_per_second"] * run.history["seconds"]).round()
    assert images.iloc[0] == images.iloc[7] == 160  # nothing is known yet; and the last eighth
    assert (images.iloc[1:7] < 140).all()
    rates = run.batches["learning_rate"]
    assert rates.is_monotonic_decreasing and rates.iloc[-1] == pytest.approx(0.07 / (8 * 5))
    batches = run.batches.groupby("epoch").size()
    assert batches.tolist() == [math.ceil(n / 32) for n in images]


def test_orthogonal_steps_have_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 16, 144), (1, 64, 27)):
        # The three iterations lift singular values of a tenth of the largest and more.
        matrices = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(training.orthogonal(matrices, iterations=5))
        assert values.min() > 0.5 and values.max() < 1.35


@pytest.mark.parametrize("shape", [(2, 32, 288), (3, 64, 64), (1, 96, 32)])
def test_steps_in_bfloat16_are_the_same_to_a_few_hundredths(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = training.orthogonal(matrices)
    rounded = training.orthogonal(matrices, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """What three Newton–Schulz iterations do: a polynomial of the singular values, three times."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(3):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def test_muon_keeps_the_norm_of_a_bank_and_moves_it_by_the_learning_rate() -> None:
    kernel = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer, momentum = training.Muon([kernel], lr=0.1, momentum=0.6), 0
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        momentum = 0.6 * momentum + kernel.grad
        kept = (kernel * (8**0.5 / kernel.norm())).detach().clone()
        optimizer.step()
        step = (kernel.detach() - kept).double() / -0.1
        expected = by_singular_values((kernel.grad + 0.6 * momentum).flatten(1))  # Nesterov's
        torch.testing.assert_close(step.flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_the_first_network_passes_its_input_on_and_no_two_branches_are_alike(
    tiny_images: data.ImageData,
) -> None:
    alike = dataclasses.replace(SMALL, kernel_size=3)
    network = training.first_network(tiny_images.train, alike)
    for block in network.blocks:
        one, two = block.branches
        assert (one.weight - two.weight).abs().mean() > 0.01
        for filter_number in range(8):
            centre = one.weight[filter_number, filter_number, 1, 1]
            assert centre == one.weight[filter_number].max() > 0.8
