"""The augmentation: what it does to pixels, what it leaves alone, where its chance comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.augment import Augmentation, cutout, mirror, shift
from helpers.settings import Settings


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("reach", [1, 4, 31])
def test_shift_moves_by_whole_pixels_with_reflection_padding(reach: int) -> None:
    images = some_images()[:, :, :, : 32 if reach > 19 else 20]  # square or not
    down, right = torch.randint(-reach, reach + 1, (2, len(images)), generator=seeded(1))
    rim = ((0, 0), (reach, reach), (reach, reach))
    for image, moved, d, r in zip(images, shift(images, down, right), down, right):
        padded = np.pad(image.numpy(), rim, mode="reflect")[:, reach - d :, reach - r :]
        assert np.array_equal(moved, padded[:, :32, : image.shape[2]])


def test_mirror() -> None:
    images = some_images(2)
    mirrored = mirror(images, torch.tensor([True, False]))
    assert np.array_equal(mirrored[0], images[0].numpy()[:, :, ::-1])
    assert torch.equal(mirrored[1], images[1])


def test_cutout_covers_a_square_and_nothing_else() -> None:
    images, colour = torch.zeros(3, 2, 8, 10, dtype=torch.uint8), torch.tensor([3, 5])
    covered = cutout(images, torch.tensor([4, 0, 7]), torch.tensor([5, 0, 9]), 4, colour)
    expected = images.clone()
    for image, rows, columns in ((0, (2, 6), (3, 7)), (1, (0, 2), (0, 2)), (2, (5, 8), (7, 10))):
        expected[image, :, slice(*rows), slice(*columns)] = colour.byte().view(2, 1, 1)
    assert torch.equal(covered, expected) and not images.any()


def made(count: int, **wanted: object) -> Augmentation:
    return Augmentation(count, seeded(), Settings(**{"translate": 0, "flip": False} | wanted))


def test_the_flip_alternates_and_belongs_to_the_image() -> None:
    images, order = some_images(200), torch.randperm(200, generator=seeded(5))
    augment = made(200, flip=True)
    epochs = [augment(images, torch.arange(200), epoch) for epoch in range(3)]
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[0].flip(3), epochs[1])
    assert 60 < (epochs[0] == images).flatten(1).all(dim=1).sum() < 140
    assert torch.equal(augment(images[order], order, 0), epochs[0][order])


def test_every_shift_and_every_centre_of_a_cutout_occurs() -> None:
    images, index = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8), torch.arange(2000)
    images[:, :, 16, 16] = 255
    moved = made(2000, translate=2)(images, index, 0)
    places = {tuple(place) for place in (moved[:, 0] > 0).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(14, 19) for column in range(14, 19)}
    covered = (made(2000, cutout=8)(images * 0, index, 0) > 0).all(dim=1)
    assert covered.flatten(1).sum(dim=1).unique().tolist()[-1] == 64
    assert covered.flatten(1).any(dim=1).all() and covered.any(dim=0).all()


def test_all_chance_comes_from_the_generator_which_the_start_asks_once() -> None:
    images, index, before = some_images(), torch.arange(40), torch.get_rng_state()
    generator, other = seeded(3), seeded(3)
    settings = Settings(cutout=8)
    first = Augmentation(40, generator, settings)
    torch.rand(40, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())
    again = Augmentation(40, seeded(3), settings)(images, index, 0)
    assert torch.equal(first(images, index, 0), again)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(made(40)(images, index, 1), images)  # nothing asked for
