"""Metrics are exact counts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers import data, evaluation
from helpers.augment import shift
from helpers.model import BlockNetwork


class MeanColour(nn.Module):
    """Logits that depend on the image only, so that batches cannot matter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) @ torch.linspace(-1, 1, 30).view(3, 10)


def test_accuracy_with_a_ragged_last_batch_is_a_count() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (1203, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (1203,), generator=generator)
    labels[1000:] = MeanColour()(data.normalise(images[1000:])).argmax(1)  # the ragged batch: right
    logits = evaluation.predict(MeanColour(), data.ImageSet(images, labels))
    right = sum(
        int(MeanColour()(data.normalise(images[i : i + 1])).argmax() == labels[i])
        for i in range(1203)
    )
    assert evaluation.correct(logits, labels) == right
    assert evaluation.accuracy(logits, labels) == right / 1203
    by_batch = [logits[i : i + 500].argmax(1).eq(labels[i : i + 500]) for i in (0, 500, 1000)]
    assert np.mean([b.float().mean() for b in by_batch]) != pytest.approx(right / 1203)


def test_predict_measures_in_evaluation_mode_and_puts_the_mode_back(
    tiny_images: data.ImageData,
) -> None:
    network = BlockNetwork([8]).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluation.predict(network, tiny_images.test)
    assert network.training
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name  # no running statistic moved


def test_test_time_augmentation_is_the_weighted_mean_of_six_views(
    tiny_images: data.ImageData,
) -> None:
    test = tiny_images.test.subset(torch.arange(7))
    network = BlockNetwork([8]).eval()
    expected = torch.zeros(7, 10)
    for images in (test.images, test.images.flip(3)):
        for pixels, weight in ((0, 0.25), (1, 0.125), (-1, 0.125)):
            moves = torch.full((7,), pixels)
            moved = shift(images, moves, moves)
            expected += weight * network(data.normalise(moved)).detach()
    given = evaluation.predict(network, test, views=evaluation.TTA)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_interval_by_hand() -> None:
    low, high = evaluation.interval(8851, 10000)
    p, n, z = 0.8851, 10000, 1.959964
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert evaluation.interval(10, 10)[1] == pytest.approx(1)


def test_an_interrupted_prediction_puts_the_mode_back(tiny_images: data.ImageData) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    network = BlockNetwork([8], classes=5).train()
    assert evaluation.predict(network, tiny_images.test).shape[1] == 5 and network.training
    network.output.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation.predict(network, tiny_images.test)
    assert network.training and network.blocks.training


def test_paired_difference_by_hand() -> None:
    first = torch.tensor([True] * 60 + [False] * 40)
    second = torch.tensor([True] * 50 + [False] * 10 + [True] * 4 + [False] * 36)  # 10 and 4 differ
    more, low, high = evaluation.paired_difference(first, second)
    centre = (10.5 - 4.5) / 102
    half = 1.96 * math.sqrt((10.5 + 4.5) / 102 - centre**2) / math.sqrt(102)
    assert (more, low, high) == pytest.approx((0.06, centre - half, centre + half))


def test_a_few_images_that_tell_two_networks_apart_prove_nothing() -> None:
    first = torch.ones(2000, dtype=torch.bool)
    second = first.clone()
    second[:4] = False  # all one way; an exact test gives p = 0.125
    more, low, high = evaluation.paired_difference(first, second)
    assert more == 0.002 and low < 0 < high
    more, low, high = evaluation.paired_difference(first, first)
    assert more == 0 and low == -high < 0, "equal here is not certainly equal"


def test_mean_and_deviation_of_runs() -> None:
    assert evaluation.mean_and_deviation(pd.Series([1.0, 2.0, 3.0]), 2) == "2.00 ± 1.00"
    assert evaluation.mean_and_deviation(pd.Series([89.125]), 1) == "89.1"


def answers(classes: list[int], confidence: list[float]) -> torch.Tensor:
    """Logits whose largest probability is as given."""
    logits = torch.zeros(len(classes), 10)
    for row, (k, p) in enumerate(zip(classes, confidence)):
        logits[row] = np.log((1 - p) / 9)
        logits[row, k] = np.log(p)
    return logits


def test_confusion_pairs_and_classes_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    logits = answers([0, 1, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0.9] * 13)
    counts = evaluation.confusion(logits, labels)
    assert counts[0].tolist() == [1, 2] + [0] * 8  # rows are the truth
    pairs = evaluation.confused_pairs(counts, data.CLASSES)
    assert pairs.iloc[0].tolist() == ["airplane – automobile", 3, 1.0]
    table = evaluation.class_table(counts, data.CLASSES)
    assert table.loc["airplane", "accuracy"] == pytest.approx(1 / 3)
    assert table.loc["airplane", "images"] == 3
    assert table.loc["automobile", "low"] < 0.5 < table.loc["automobile", "high"]


def test_confident_mistakes_are_mistakes_and_sorted() -> None:
    logits = answers([1, 1, 2, 3, 0], [0.5, 0.9, 0.99, 0.7, 0.8])
    labels = torch.tensor([0, 0, 2, 0, 0])
    assert evaluation.confident_mistakes(logits, labels, 2).tolist() == [1, 3]
    assert evaluation.confident_mistakes(logits, labels, 9).tolist() == [1, 3, 0]


def test_calibration_by_hand() -> None:
    logits = answers([0, 0, 1, 1], [0.95, 0.95, 0.55, 0.55])
    measured = evaluation.calibration(logits, torch.tensor([0, 0, 1, 9]), bins=10)
    assert measured.count.tolist() == [2, 2]
    assert measured.confidence == pytest.approx([0.55, 0.95])
    assert measured.accuracy == pytest.approx([0.5, 1.0])
    assert measured.error == pytest.approx(0.05, abs=1e-6)  # of a float32 softmax
    certain = torch.zeros(3, 10)
    certain[:, 4] = 1000.0  # probability 1 belongs to the last bin
    assert evaluation.calibration(certain, torch.tensor([4, 4, 4])).error == 0


def test_entropy_is_one_for_alike_and_zero_for_one() -> None:
    a = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    assert evaluation.entropy(a).tolist() == pytest.approx([1.0, 0.0])


def test_gates_and_their_class_means(tiny_images: data.ImageData) -> None:
    network = BlockNetwork([8, 8], branches=(2, 3))
    for block in network.blocks:
        nn.init.normal_(block.fc.weight)
    first, second = evaluation.gates(network, tiny_images.test)
    assert first.shape == (len(tiny_images.test), 2) and second.shape[1] == 3
    x = data.normalise(tiny_images.test.images)
    torch.testing.assert_close(first, network.blocks[0].gate(x).detach())
    means = evaluation.class_means(first, tiny_images.test.labels)
    of_class_3 = first[tiny_images.test.labels == 3].mean(dim=0)
    torch.testing.assert_close(means[3], of_class_3)


def test_replaced_gates_change_the_copy_only(tiny_images: data.ImageData) -> None:
    network = BlockNetwork([8], branches=3)
    nn.init.normal_(network.blocks[0].fc.weight)
    own = evaluation.predict(network, tiny_images.test)
    a = evaluation.gates(network, tiny_images.test)
    for what in ("mean", "shuffled"):
        changed = evaluation.with_replaced_gates(network, a, what)
        assert not torch.allclose(evaluation.predict(changed, tiny_images.test), own)
    x = data.normalise(tiny_images.test.images[:5])
    shuffled = evaluation.with_replaced_gates(network, a, "shuffled").blocks[0].gate(x)
    torch.testing.assert_close(shuffled[1:], network.blocks[0].gate(x)[:-1])
    mean = evaluation.with_replaced_gates(network, a, "mean").blocks[0].gate(x)
    torch.testing.assert_close(mean, a[0].mean(dim=0).expand(5, 3))
    torch.testing.assert_close(evaluation.predict(network, tiny_images.test), own)
    with pytest.raises(ValueError, match="nothing"):
        evaluation.with_replaced_gates(network, a, "nothing")


def test_gates_are_replaced_in_the_named_blocks_only(tiny_images: data.ImageData) -> None:
    network = BlockNetwork([8, 8], branches=3)
    for block in network.blocks:
        nn.init.normal_(block.fc.weight)
    a, x = evaluation.gates(network, tiny_images.test), data.normalise(tiny_images.test.images[:5])
    first, second = evaluation.with_replaced_gates(network, a, "mean", among=[2]).blocks
    torch.testing.assert_close(first.gate(x), network.blocks[0].gate(x))
    torch.testing.assert_close(second.gate(x), a[1].mean(dim=0).expand(5, 3))
    with pytest.raises(ValueError, match=r"among=\[3\] is not allowed; blocks are 1 to 2"):
        evaluation.with_replaced_gates(network, a, "mean", among=[3])
    with pytest.raises(ValueError, match="the weights of 1 blocks, and the network has 2"):
        evaluation.with_replaced_gates(network, a[:1], "mean")


def test_the_class_is_told_from_a_that_knows_it_and_not_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 10
    noise = torch.randn(600, 3, generator=generator)
    assert evaluation.class_from_gates(noise, labels) < 0.2
    telling = torch.nn.functional.one_hot(labels, 10) + 0.1 * torch.randn(600, 10)
    assert evaluation.class_from_gates(telling, labels) > 0.95


def test_colour_explains_what_is_made_of_it(tiny_images: data.ImageData) -> None:
    images = tiny_images.train.images
    red = images[:, 0].float().mean(dim=(1, 2))
    made = torch.stack([red, -2 * red], dim=1)
    assert evaluation.explained_by_colour(made, images) == pytest.approx(1, abs=0.01)
    noise = torch.randn(len(images), 2, generator=torch.Generator().manual_seed(1))
    assert evaluation.explained_by_colour(noise, images) < 0.1
    assert math.isnan(evaluation.explained_by_colour(torch.full_like(noise, 0.5), images))
    nearly_dead = torch.cat([made[:, :1], 1e-3 * noise], dim=1)  # these vary next to nothing
    assert evaluation.explained_by_colour(nearly_dead, images) == pytest.approx(1, abs=0.01)
