"""Predictions are those of evaluation mode; what is made of them is worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import evaluation
from helpers.data import CLASSES, ImageSet, normalise
from helpers.model import BlockNetwork


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    """1,003 images of noise, for three batches."""
    generator = torch.Generator().manual_seed(0)
    noise = 128 + 40 * torch.randn(1003, 3, 32, 32, generator=generator)
    return ImageSet(noise.clamp(0, 255).to(torch.uint8), torch.arange(1003) % 10)


@pytest.fixture
def network() -> BlockNetwork:
    """Blocks of two and three branches whose a depends on the image."""
    torch.manual_seed(0)
    rows = [dict(channels=4, kernels=[3, 1], pool=True), dict(channels=6, kernels=[3, 3, 1])]
    made = BlockNetwork(rows, gate="softmax", implementation="reference")
    for block in made.blocks:
        nn.init.normal_(block.fc.weight, std=3)
    return made


def logits_of(predictions: list[int], confidences: list[float]) -> Tensor:
    """Logits, n×10, whose largest probability is as given."""
    logits = torch.tensor([[math.log((1 - p) / 9)] * 10 for p in confidences])
    logits[range(len(logits)), predictions] = torch.tensor(confidences).log()
    return logits


def test_predictions_are_of_evaluation_mode(network: BlockNetwork, image_set: ImageSet) -> None:
    drawn = torch.get_rng_state()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    logits, a = evaluation.predict(network, image_set), evaluation.gates(network, image_set)
    with pytest.raises(KeyboardInterrupt), evaluation.evaluating(network, torch.float32):
        assert not network.training and not torch.backends.cudnn.allow_tf32
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), drawn) and torch.backends.cudnn.allow_tf32
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    x = normalise(image_set.images)
    torch.testing.assert_close([logits, *a], [network.eval()(x), *network.gates(x)])
    small = evaluation.predict(network, image_set, size=16)
    torch.testing.assert_close(small, network(F.avg_pool2d(x, 2)))
    low = evaluation.predict(network, image_set, precision=torch.bfloat16)
    assert low.dtype == torch.float32 and 0 < (low - logits).abs().max() < 0.1


def test_six_views_of_the_least_certain_quarter(image_set: ImageSet) -> None:
    some, expected = image_set.subset(torch.arange(8)), 0
    unsure = some.subset(torch.tensor([5, 2]))
    framed = F.pad(unsure.images.float(), [1, 1, 1, 1], mode="reflect")
    for k, weight in ((0, 1 / 4), (1, 1 / 8), (-1, 1 / 8)):  # moved down and right by k
        moved = normalise(framed[:, :, 1 - k : 33 - k, 1 - k : 33 - k])
        expected = expected + weight * (moved + moved.flip(3)).flatten(1)
    pixels = nn.Sequential(nn.PReLU(init=1), nn.Flatten())  # gives what it gets
    logits = torch.zeros(8, 3072)
    logits[:, 0] = torch.tensor([9.0, 9, 2, 9, 9, 1, 9, 9])  # 2 and 5 are the least certain
    views = evaluation.six_views(pixels, some, logits, torch.float32)
    torch.testing.assert_close(views[[5, 2]], expected)
    assert torch.equal(views[[0, 1, 3, 4, 6, 7]], logits[[0, 1, 3, 4, 6, 7]])


def test_accuracy_and_interval_by_hand() -> None:
    logits, labels = logits_of([3, 1, 2], [0.9, 0.5, 0.7]), torch.tensor([3, 1, 0])
    assert evaluation.is_correct(logits, labels).tolist() == [True, True, False]
    assert evaluation.accuracy(logits, labels) == 2 / 3
    z2 = 1.959964**2  # Wilson's interval is around (k + z²/2) / (n + z²)
    centre, half = (4 + z2 / 2) / (10 + z2), math.sqrt(z2 * (4 * 6 / 10 + z2 / 4)) / (10 + z2)
    assert evaluation.interval(4, 10) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_paired_difference_by_hand() -> None:
    k = torch.arange(100)
    first, second = k < 60, (k < 50) | (k >= 96)  # 10 images and 4 tell them apart
    half = 1.96 * math.sqrt(15 / 102 - (6 / 102) ** 2) / math.sqrt(102)
    difference = evaluation.paired_difference(first, second)
    assert difference == pytest.approx((0.06, 6 / 102 - half, 6 / 102 + half))
    assert evaluation.paired_difference(first, first)[1] < 0, "not certainly equal"


def test_confusion_pairs_and_classes_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8])
    counts = evaluation.confusion(logits_of([0, 1, 1, 0, *labels[4:]], [0.9] * 12), labels)
    assert counts[0].tolist() == [1, 2] + [0] * 8  # rows are the truth
    pairs = evaluation.confused_pairs(counts, CLASSES)
    assert pairs.iloc[0].tolist() == ["airplane – automobile", 3, 1.0]
    table = evaluation.class_table(counts, CLASSES)
    assert table.loc["airplane"].tolist() == [3, 1 / 3, *evaluation.interval(1, 3)]
    assert table.loc["truck", ["images", "low", "high"]].tolist() == [0, 0, 1]


def test_calibration_selection_and_mistakes_by_hand() -> None:
    logits, labels = logits_of([0, 0, 1, 1], [0.52, 0.95, 0.58, 0.92]), torch.tensor([9, 0, 1, 5])
    table, error = evaluation.calibration(logits, labels, bins=10)  # two images in each of two bins
    assert table["images"].tolist() == [2, 2] and table["accuracy"].tolist() == [0.5, 0.5]
    assert table["confidence"].tolist() == pytest.approx([0.55, 0.935])
    assert error == pytest.approx((0.05 + 0.435) / 2)
    certain = torch.cat([logits_of([4], [0.97]), 1000 * F.one_hot(labels[:1]).float()])
    assert evaluation.calibration(certain, labels[:2])[0]["images"].tolist() == [2]  # 1 included
    table = evaluation.selective(logits, labels)
    assert table["answered"].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert table["accuracy"].tolist() == [1, 1 / 2, 2 / 3, 2 / 4]
    assert evaluation.confident_mistakes(logits, labels, 1).tolist() == [3]
    assert evaluation.confident_mistakes(logits, labels, 9).tolist() == [3, 0]


def test_a_temperature_makes_confidence_the_accuracy_of_the_other_half() -> None:
    labels = torch.tensor([0] * 8 + [1] * 2)  # class 0 in four of five, even and odd
    logits = torch.tensor([[3.0, 0.0], [0.5, 0.0]]).repeat(5, 1)  # log 4 would be honest
    divided, (even, odd) = evaluation.with_fitted_temperature(logits, labels)
    assert [even, odd] == pytest.approx([3 / math.log(4), 0.5 / math.log(4)], rel=1e-4)
    assert divided[:2, 0].tolist() == pytest.approx([3 / odd, 0.5 / even])


def test_corruptions_grow_from_nothing(network: BlockNetwork, image_set: ImageSet) -> None:
    some = image_set.subset(torch.arange(30))
    for corruption, none in zip(evaluation.CORRUPTIONS, (0, 0.01, 1, 100), strict=True):
        changes = []
        for strength in (none, *evaluation.CORRUPTIONS[corruption]):
            worse = evaluation.corrupted(some.images, corruption, strength)
            assert worse.shape == some.images.shape and worse.dtype == torch.uint8
            changes.append(float((worse.float() - some.images.float()).abs().mean()))
        assert changes == sorted(set(changes)) and changes[1] > 1
        assert changes[0] == 0 or corruption.startswith("JPEG")
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    assert float(evaluation.corrupted(grey, "noise", 20).float().std()) == pytest.approx(20, 0.02)
    table = evaluation.robustness(network, some, torch.float32)
    own = evaluation.accuracy(evaluation.predict(network, some), some.labels)
    assert table.loc[table["step"] == 0, "accuracy"].tolist() == [own] * 4
    assert table["strength"][1:6].tolist() == evaluation.CORRUPTIONS["noise: σ (grey levels)"]


def test_what_a_tells(image_set: ImageSet) -> None:
    a, labels = torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.3, 0.7]]), torch.tensor([1, 0, 1])
    torch.testing.assert_close(evaluation.class_means(a, labels)[1], torch.tensor([0.2, 0.8]))
    noise = torch.randn(1003, 3, generator=torch.Generator().manual_seed(0))
    assert evaluation.class_from_gates(noise, image_set.labels) < 0.2
    assert evaluation.class_from_gates(F.one_hot(image_set.labels), image_set.labels) == 1
    red = image_set.images[:, 0].float().mean(dim=(1, 2))
    made = torch.stack([red, 1e-3 * noise[:, 0]], dim=1)  # the second varies hardly at all
    assert evaluation.explained_by_colour(made, image_set.images) == pytest.approx(1, abs=0.01)
    assert evaluation.explained_by_colour(noise, image_set.images) < 0.1
    assert math.isnan(evaluation.explained_by_colour(torch.ones(1003, 2), image_set.images))


def test_gates_are_replaced_in_a_copy(network: BlockNetwork, image_set: ImageSet) -> None:
    a, x = evaluation.gates(network, image_set), normalise(image_set.images[:5])
    own, logits = network.eval().gates(x), network(x)
    expected = {"mean": a[0].mean(dim=0).expand(5, 2), "shuffled": own[0].roll(1, dims=0)}
    for what, first in expected.items():
        everywhere = evaluation.with_replaced_gates(network, a, what)
        in_one = evaluation.with_replaced_gates(network, a, what, among=[2])
        torch.testing.assert_close(everywhere.gates(x)[0], first)
        torch.testing.assert_close(in_one.gates(x)[0], own[0])
        for changed in (everywhere, in_one):
            assert not torch.allclose(changed.gates(x)[1], own[1], atol=0.01)
            assert not torch.allclose(changed(x), logits, atol=1e-4)
    assert torch.equal(network(x), logits)
    with pytest.raises(KeyError, match="max"):
        evaluation.with_replaced_gates(network, a, "max")
