"""Worse images, covered images, likeness and doubt: against libraries, or worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from helpers import data, evaluation, probing
from helpers.model import BlockNetwork

SEEDED = torch.Generator().manual_seed(0)


def test_noise_has_the_deviation_that_it_claims() -> None:
    grey = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    worse = probing.noisy(grey, 20, SEEDED).float()
    assert worse.std() == pytest.approx(20, rel=0.02)
    assert worse.mean() == pytest.approx(128, abs=0.5)


@pytest.mark.parametrize("sigma", [0.5, 1, 2])
def test_blur_is_that_of_scipy(sigma: float, tiny_images: data.ImageData) -> None:
    some = tiny_images.test.images[:3]
    ours = probing.blurred(some, sigma, SEEDED).float().numpy()
    radius = round(3 * sigma)
    theirs = gaussian_filter(some.float().numpy(), sigma, radius=radius, axes=(2, 3), mode="mirror")
    assert np.abs(ours - theirs).max() <= 1  # levels, by rounding


def test_fading_and_compressing_take_away(tiny_images: data.ImageData) -> None:
    some = tiny_images.test.images[:5]
    spread = [float(probing.faded(some, f, SEEDED).float().std()) for f in (1.0, 0.5, 0.15)]
    assert spread[1] == pytest.approx(spread[0] / 2, rel=0.1) and spread[2] < spread[1] / 2
    lost = [
        float((probing.compressed(some, q, SEEDED).float() - some.float()).abs().mean())
        for q in (95, 50, 8)
    ]
    assert 0 < lost[0] < lost[1] < lost[2]


def test_every_corruption_grows_and_keeps_the_images_shape(tiny_images: data.ImageData) -> None:
    some = tiny_images.test.images[:4]
    for make_worse, strengths in probing.CORRUPTIONS.values():
        changes = []
        for strength in strengths:
            worse = make_worse(some, strength, torch.Generator().manual_seed(1))
            assert worse.shape == some.shape and worse.dtype == torch.uint8
            changes.append(float((worse.float() - some.float()).abs().mean()))
        assert changes == sorted(changes) and changes[0] > 0


def test_robustness_begins_with_the_accuracy_on_untouched_images(
    tiny_images: data.ImageData,
) -> None:
    network = BlockNetwork([8], pool_after=[1]).eval()
    table = probing.robustness(network, tiny_images.test)
    own = evaluation.accuracy(
        evaluation.predict(network, tiny_images.test), tiny_images.test.labels
    )
    assert table.loc[table["step"] == 0, "accuracy"].tolist() == [own] * 4
    assert len(table) == 4 * 6 and (table["low"] <= table["accuracy"]).all()
    assert table.equals(probing.robustness(network, tiny_images.test))


class LooksAtOneCorner(nn.Module):
    """Is sure of class 3 as far as the upper left 8×8 pixels are bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 10)
        logits[:, 3] = x[:, :, :8, :8].mean((1, 2, 3))
        return logits


def test_covering_costs_where_the_network_looks() -> None:
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    losses = probing.occlusion(LooksAtOneCorner(), white, answer=3, side=8, step=2)
    assert losses.shape == (16, 16)
    assert torch.equal(losses == losses.max(), (losses == losses[1:3, 1:3].max()))
    assert losses[:5, :5].min() > 0
    assert (losses[7:, :] == 0).all() and (losses[:, 7:] == 0).all()


def test_the_means_are_what_the_logits_are_made_of(tiny_images: data.ImageData) -> None:
    network = BlockNetwork([8, 12], pool_after=[1]).eval()
    logits, m = probing.logits_and_means(network, tiny_images.test)
    assert m.shape == (len(tiny_images.test), 12)
    assert torch.equal(logits, evaluation.predict(network, tiny_images.test))
    with torch.inference_mode():
        torch.testing.assert_close(network.output.fc(m), logits)


def test_nearest_are_those_of_scikit_learn() -> None:
    some, others = torch.randn(4, 6, generator=SEEDED), torch.randn(30, 6, generator=SEEDED)
    there, cosines = probing.nearest(some, others, 3)
    book = cosine_similarity(some.numpy(), others.numpy())
    assert there.tolist() == np.argsort(-book, axis=1)[:, :3].tolist()
    np.testing.assert_allclose(cosines.numpy(), -np.sort(-book, axis=1)[:, :3], rtol=1e-5)


def overconfident(n: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose honest version is theirs divided by the temperature, and drawn labels."""
    logits = 2 * torch.randn(n, 10, generator=SEEDED)
    labels = torch.multinomial(logits.softmax(1), 1, generator=SEEDED).flatten()
    return temperature * logits, labels


def test_the_temperature_is_found_again() -> None:
    logits, labels = overconfident(20_000, 2.5)
    T = evaluation.fitted_temperature(logits, labels)
    assert pytest.approx(2.5, rel=0.05) == T
    step = torch.tensor(math.log(T), requires_grad=True, dtype=torch.float64)
    F.cross_entropy(logits.double() / step.exp(), labels).backward()
    assert abs(step.grad) < 1e-4  # a minimum


def test_no_image_has_a_say_in_its_own_temperature() -> None:
    logits, labels = overconfident(4000, 2.5)
    divided, (even, odd) = evaluation.with_fitted_temperature(logits, labels)
    torch.testing.assert_close(divided[::2], logits[::2] / odd)
    torch.testing.assert_close(divided[1::2], logits[1::2] / even)
    before = evaluation.calibration(logits, labels).error
    assert evaluation.calibration(divided, labels).error < before / 2
    assert torch.equal(divided.argmax(1), logits.argmax(1))


def test_answered_by_hand() -> None:
    logits = torch.zeros(4, 10)
    logits[range(4), [1, 2, 3, 4]] = torch.tensor([3.0, 9.0, 5.0, 1.0])
    table = evaluation.answered(logits, torch.tensor([1, 2, 0, 4]))
    assert table["answered"].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert table["accuracy"].tolist() == pytest.approx([1, 1 / 2, 2 / 3, 3 / 4])
    assert table["confidence"].is_monotonic_decreasing


def test_near_duplicates_are_those_whose_nearest_training_image_is_near() -> None:
    """Of smooth images with more and more noise, of one level as well, against all distances."""
    generator = torch.Generator().manual_seed(3)
    levels = 255 * torch.rand(60, 3, 4, 4, generator=generator)
    train = F.interpolate(levels, size=(32, 32), mode="bilinear").to(torch.uint8)
    train[0] = 90
    test = torch.stack([probing.noisy(train[k], k, generator) for k in range(40)])
    labels = torch.arange(60) % 10
    images = data.ImageData(
        "stand-in", data.ImageSet(train, labels), data.ImageSet(test, labels[:40])
    )
    own = test.flatten(1).double().std(dim=1, correction=0)
    distance = torch.cdist(test.flatten(1).double(), train.flatten(1).double()) / math.sqrt(3072)
    near = distance.min(dim=1).values < data.NEAR * own
    assert torch.equal(data.near_duplicates(images), near)
    assert 10 < int(near.sum()) < 35


def test_where_no_image_has_anything_like_it_there_are_no_near_duplicates() -> None:
    dark, light = torch.zeros(300, 3, 32, 32), torch.full((20, 3, 32, 32), 255.0)
    light[:, :, ::2] -= 1  # without any contrast nothing could be near
    sets = [data.ImageSet(x.to(torch.uint8), torch.zeros(len(x)).long()) for x in (dark, light)]
    assert not data.near_duplicates(data.ImageData("stand-in", *sets)).any()
