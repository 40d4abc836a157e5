"""The augmentation: what it does to pixels, what it leaves alone, where its chance comes from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import TrivialAugmentWide

from helpers import augment
from helpers.augment import Augmentation, alter, cover, mirror, operate, shift, shrink
from helpers.data import MEAN_COLOUR


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=seeded())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("reach", [1, 2, 4, 31])
def test_shift_moves_by_whole_pixels_with_reflection(reach: int, dtype: torch.dtype) -> None:
    images = some_images().to(dtype)
    down, right = torch.randint(-reach, reach + 1, (2, len(images)), generator=seeded(1))
    moved = shift(images, down, right)
    rim = ((0, 0), (reach, reach), (reach, reach))
    for image, result, d, r in zip(images, moved, down.tolist(), right.tolist()):
        padded = np.pad(image.numpy(), rim, mode="reflect")
        expected = padded[:, reach - d : reach - d + 32, reach - r : reach - r + 32]
        assert np.array_equal(result.numpy(), expected)
    assert moved.dtype == dtype


def test_shrink_takes_the_mean_of_what_a_pixel_covers() -> None:
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    blocks = images.view(2, 3, 16, 2, 16, 2).mean(dim=(3, 5))
    torch.testing.assert_close(shrink(images, 16), blocks)
    assert shrink(images, 24).shape == (2, 3, 24, 24)
    assert shrink(images, 32) is images


def test_shift_goes_down_and_right() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 10, 20] = 1
    moved = shift(image, torch.tensor([3]), torch.tensor([-2]))
    assert moved[0, :, 13, 18].tolist() == [1, 1, 1]
    assert moved.sum() == 3


def test_shift_of_images_that_are_not_square() -> None:
    images = torch.arange(2 * 3 * 5 * 9).view(2, 3, 5, 9)
    moved = shift(images, torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert torch.equal(moved[0, :, 1:], images[0, :, :-1])
    assert torch.equal(moved[0, :, 0], images[0, :, 1])  # the reflection
    assert torch.equal(moved[1, :, :, 2:], images[1, :, :, :-2])


def test_mirror_touches_only_the_chosen() -> None:
    images = some_images(4)
    mirrored = mirror(images, torch.tensor([True, False, True, False]))
    assert np.array_equal(mirrored[0], images[0].numpy()[:, :, ::-1])
    assert torch.equal(mirrored[1], images[1])
    assert torch.equal(mirrored[2].flip(2), images[2])
    assert torch.equal(mirrored[3], images[3])


def test_alter_touches_only_the_chosen_and_no_other_chance() -> None:
    images, which = some_images(40), torch.arange(40) % 2 == 0
    colour = torch.tensor([1.0, 2.0, 3.0])
    before = torch.get_rng_state()
    altered = alter(images, which, seeded(1), colour)
    assert torch.equal(torch.get_rng_state(), before)
    assert altered.dtype == torch.uint8 and altered.shape == images.shape
    same = (altered == images).flatten(1).all(dim=1)
    assert same[~which].all()
    assert same[which].float().mean() < 0.5  # one operation of fourteen is to do nothing
    torch.rand(5)
    assert torch.equal(alter(images, which, seeded(1), colour), altered)
    assert not torch.equal(alter(images, which, seeded(2), colour), altered)


def images_of_all_kinds() -> torch.Tensor:
    """Bytes 8×3×32×32: noise, smooth images, smooth ones of few and dim colours, and one colour."""
    smooth = F.interpolate(
        255 * torch.rand(3, 3, 4, 4, generator=seeded(1)), (32, 32), mode="bicubic"
    )
    smooth = smooth.clamp(0, 255).to(torch.uint8)
    plain = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    return torch.cat((some_images(2), smooth, smooth[:2] // 32 + 50, plain))


def as_torchvision_does(images: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    """Images altered one by one by an operation of torchvision's TrivialAugmentWide."""
    change = TrivialAugmentWide(fill=MEAN_COLOUR.tolist())
    settings = (name, magnitude, change.interpolation, change._fill)
    return torch.stack([change._apply_image_or_video_transform(i, *settings) for i in images])


def by_torchvisions_table(name: str) -> list[float]:
    """The magnitude of each column of `augment.MAGNITUDES`, as torchvision gives it."""
    values, signed = TrivialAugmentWide._AUGMENTATION_SPACE[name]
    magnitudes = values(31, 32, 32)
    magnitudes = [0.0] * 31 if magnitudes is None else [float(m) for m in magnitudes]
    return magnitudes + [-m if signed else m for m in magnitudes]


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_operation_does_what_torchvisions_does(name: str) -> None:
    images = images_of_all_kinds()
    number = torch.full((len(images),), augment.OPERATIONS.index(name))
    for setting, magnitude in enumerate(by_torchvisions_table(name)):
        expected = as_torchvision_does(images, name, magnitude)
        altered = operate(images, number, torch.full_like(number, setting), MEAN_COLOUR)
        wrong = (altered != expected).any(dim=1).float().mean()
        # Where a pixel's source lies between two, rounding may decide for the other one.
        assert wrong <= (0.005 if name in augment.MOVES else 0), (setting, magnitude)


def test_the_operations_are_torchvisions() -> None:
    assert set(augment.OPERATIONS) == set(TrivialAugmentWide._AUGMENTATION_SPACE)


def test_each_image_of_a_mixed_batch_is_altered_by_its_own_operation() -> None:
    images = some_images(100)
    operation = torch.randint(14, (100,), generator=seeded(1))
    setting = torch.randint(62, (100,), generator=seeded(2))
    before = images.clone()
    together = operate(images, operation, setting, MEAN_COLOUR)
    alone = [
        operate(*(of_all[i : i + 1] for of_all in (images, operation, setting)), MEAN_COLOUR)
        for i in range(100)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(images, before)  # nothing is written into what was given


def test_images_that_are_not_square_are_altered_as_by_torchvision() -> None:
    images = images_of_all_kinds()[:, :, :20]
    for name in augment.MOVES:
        number = torch.full((len(images),), augment.OPERATIONS.index(name))
        altered = operate(images, number, torch.full_like(number, 13), MEAN_COLOUR)
        expected = as_torchvision_does(images, name, by_torchvisions_table(name)[13])
        assert (altered == expected).float().mean() >= 0.995, name


def test_every_operation_bin_and_sign_has_the_same_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(augment, "operate", lambda *what: drawn.extend(what[1:3]))
    count = 62_000
    alter(torch.empty(0), torch.ones(count, dtype=torch.bool), seeded(), MEAN_COLOUR)
    for numbers, kinds in zip(drawn, (14, 62)):
        often = numbers.bincount(minlength=kinds) / (count / kinds)
        assert len(often) == kinds and (often - 1).abs().max() < 0.15  # 4.7 deviations of 62 kinds
    both = (drawn[0] * 62 + drawn[1]).bincount(minlength=14 * 62)
    assert both.min() > 25 and both.max() < 125  # of 71 each: the two are independent


def test_an_images_fate_does_not_depend_on_which_others_are_altered() -> None:
    images, first = some_images(40), torch.arange(40) < 20
    everything = alter(images, torch.ones(40, dtype=torch.bool), seeded(1), MEAN_COLOUR)
    half = alter(images, first, seeded(1), MEAN_COLOUR)
    assert torch.equal(half, torch.where(first.view(-1, 1, 1, 1), everything, images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_augmentation_never_waits_for_the_gpu_and_alters_as_on_the_cpu() -> None:
    images, index = some_images(500), torch.arange(500)
    there = images.cuda()
    results = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for where in (images, there):
            vary = Augmentation(500, 2, True, seeded(), cutout=8, trivial_augment=0.9)
            results.append(vary(where, index, 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, on_gpu = results[0], results[1].cpu()
    assert (on_cpu != on_gpu).float().mean() < 0.002  # roundings


def test_what_comes_in_where_an_image_was_moved_has_the_colour_asked_for() -> None:
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    colour = torch.tensor([10.0, 20.0, 30.0])
    altered = alter(white, torch.ones(200, dtype=torch.bool), seeded(), colour)
    filled = (altered == colour.view(1, 3, 1, 1)).all(dim=1)
    assert filled.flatten(1).any(dim=1).sum() > 40  # five of the fourteen operations move


def test_the_share_of_altered_images_is_the_one_asked_for() -> None:
    images, index = some_images(400), torch.arange(400)
    augment = Augmentation(400, 0, False, seeded(), trivial_augment=0.25)
    changed = (augment(images, index, 0) != images).flatten(1).any(dim=1)
    assert 0.15 < changed.float().mean() < 0.28
    again = (augment(images, index, 1) != images).flatten(1).any(dim=1)
    assert not torch.equal(changed, again)  # others in the next epoch


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"trivial_augment=.* use a share from 0 to 1"):
        Augmentation(10, 2, True, seeded(), trivial_augment=share)


def test_mirror_alternates_between_epochs() -> None:
    images, index = some_images(200), torch.arange(200)
    augment = Augmentation(200, translate=0, flip=True, generator=seeded())
    epochs = [augment(images, index, epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert torch.equal(epochs[0].flip(3), epochs[1])
    as_they_are = (epochs[0] == images).flatten(1).all(dim=1).sum().item()
    assert 60 < as_they_are < 140  # about half of the images begin mirrored


def test_mirror_belongs_to_the_image_and_not_to_its_place_in_the_batch() -> None:
    images, order = some_images(20), torch.randperm(20, generator=seeded(5))
    augment = Augmentation(20, translate=0, flip=True, generator=seeded())
    whole = augment(images, torch.arange(20), 0)
    assert torch.equal(augment(images[order], order, 0), whole[order])


def test_shapes_and_types_stay_and_every_move_occurs() -> None:
    images = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    augment = Augmentation(2000, translate=2, flip=False, generator=seeded())
    result = augment(images, torch.arange(2000), 0)
    assert result.shape == images.shape and result.dtype == torch.uint8
    places = {tuple(place) for place in (result[:, 0] > 0).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(14, 19) for column in range(14, 19)}


def test_nothing_asked_for_is_nothing_done() -> None:
    images = some_images()
    augment = Augmentation(12, translate=0, flip=False, generator=seeded())
    assert torch.equal(augment(images, torch.arange(12), 1), images)


def test_chance_comes_from_the_generator_alone() -> None:
    images, index = some_images(), torch.arange(12)
    first = Augmentation(12, 2, True, seeded(3), 8, 0.5)(images, index, 0)
    torch.rand(5)  # the global generator moves on
    before = torch.get_rng_state()
    second = Augmentation(12, 2, True, seeded(3), 8, 0.5)(images, index, 0)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, Augmentation(12, 2, True, seeded(4), 8, 0.5)(images, index, 0))


@pytest.mark.parametrize("pixels", [-1, 32, 1.5, True, "2"])
def test_pixels_that_are_not_allowed_are_named(pixels: object) -> None:
    with pytest.raises(ValueError, match=r"translate=.* is not allowed; use whole pixels"):
        Augmentation(10, pixels, True, seeded())
    with pytest.raises(ValueError, match=r"cutout=.* is not allowed; use whole pixels"):
        Augmentation(10, 2, True, seeded(), pixels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cover_covers_a_square_and_nothing_else(dtype: torch.dtype) -> None:
    images = torch.zeros(3, 2, 8, 10, dtype=dtype)
    colour = torch.tensor([3, 5])
    row, column = torch.tensor([4, 0, 7]), torch.tensor([5, 0, 9])
    covered = cover(images, row, column, 4, colour)
    expected = images.clone()
    for image, rows, columns in ((0, (2, 6), (3, 7)), (1, (0, 2), (0, 2)), (2, (5, 8), (7, 10))):
        expected[image, :, slice(*rows), slice(*columns)] = colour.to(dtype).view(2, 1, 1)
    assert torch.equal(covered, expected) and covered.dtype == dtype


def test_every_image_is_covered_somewhere_else_in_the_mean_colour() -> None:
    images = torch.full((500, 3, 32, 32), 255, dtype=torch.uint8)
    augment = Augmentation(500, translate=0, flip=False, generator=seeded(), cutout=8)
    result = augment(images, torch.arange(500), 0)
    covered = (result != 255).any(dim=1)
    assert covered.flatten(1).sum(dim=1).max() == 64 and covered.flatten(1).any(dim=1).all()
    assert {tuple(c) for c in result.permute(0, 2, 3, 1)[covered].tolist()} == {(125, 123, 114)}
    assert covered.float().mean(dim=0).min() > 0  # every place is covered in some image
