"""How a batch of training images is varied, all at once: mirrored, shifted, covered, shrunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import TrivialAugmentWide

from helpers.data import MEAN_COLOUR


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """Mirror left and right those of b×3×h×w images where `which`, b booleans, is true."""
    return torch.where(which.view(-1, 1, 1, 1), images.flip(3), images)


def shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move each of b×c×h×w images, of any number type, by its own whole number of pixels.

    What comes in at the rim is the image's reflection there. Every pixel is fetched once, from
    where it comes, which on a CPU is ten times faster than padding and cropping.

    Args:
        down, right: b integers each, of less than h and w in size; negative is up and left.
    """
    b, c, h, w = images.shape
    rows = reflect(torch.arange(h, device=images.device) - down.view(-1, 1), h)  # b×h
    columns = reflect(torch.arange(w, device=images.device) - right.view(-1, 1), w)  # b×w
    source = rows.view(b, h, 1) * w + columns.view(b, 1, w)  # b×h×w, numbers of pixels
    source = source.view(b, 1, h * w).expand(b, c, h * w)
    return images.flatten(2).gather(2, source).view(b, c, h, w)


def reflect(position: Tensor, size: int) -> Tensor:
    """Positions beyond 0 … size − 1, by less than `size`, as their reflection at the last one."""
    last = size - 1
    return last - (last - position.abs()).abs()


def cover(images: Tensor, row: Tensor, column: Tensor, side: int, colour: Tensor) -> Tensor:
    """Cover a square of side×side pixels in each of b×c×h×w images (cutout, T. DeVries and
    G. Taylor, arXiv 1708.04552); at the rim a part of it.

    Args:
        row, column: b integers each, the centres.
        colour: c values, the square's.
    """
    h, w = images.shape[2:]
    first_row, first_column = (centre.view(-1, 1) - side // 2 for centre in (row, column))
    rows, columns = (torch.arange(n, device=images.device) for n in (h, w))
    in_rows = (rows >= first_row) & (rows < first_row + side)  # b×h
    in_columns = (columns >= first_column) & (columns < first_column + side)  # b×w
    covered = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(covered, colour.to(images).view(1, -1, 1, 1), images)


def alter(images: Tensor, which: Tensor, generator: torch.Generator, colour: Tensor) -> Tensor:
    """Alter those of b×3×h×w uint8 images where `which`, b booleans, is true: each by one operation
    of any strength, such as a turn, a shear, a change of contrast or of sharpness (TrivialAugment:
    S. Müller and F. Hutter, arXiv 2103.10158; its wide ranges, torchvision's implementation).

    Args:
        generator: gives the seed from which torchvision draws; the global one stays as it is.
        colour: 3 values, of what comes in at the rim.
    """
    change = TrivialAugmentWide(fill=colour.tolist())
    altered = images.clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for position in which.nonzero().flatten().tolist():
            altered[position] = change(images[position])
    return altered


def shrink(images: Tensor, size: int) -> Tensor:
    """b×c×h×w images of floats as b×c×size×size: each pixel the mean of those that it covers.

    To learn from small images first takes less time (progressive resizing: J. Howard, fast.ai, in
    the DAWNBench competition of 2018).
    """
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="area")


class Augmentation:
    """Alternating mirror, random shift, TrivialAugment and covered square for a training set of
    known size.

    Whether an image is mirrored in its first epoch is drawn; from then on it alternates, so
    that any two epochs in a row show every image both ways (cifar10-airbench, K. Jordan).

    Args:
        images: size N of the training set.
        translate: largest shift in pixels, in both directions; 0 for none.
        flip: whether to mirror.
        generator: the only source of randomness here.
        cutout: side in pixels of the square that is covered with the images' mean colour, its
            centre anywhere; 0 for none.
        trivial_augment: share of the images that are altered by `alter`, drawn anew each time.

    Raises:
        ValueError: a translation or a cutout that is not 0 to 31 whole pixels, or a share that is
            not from 0 to 1.
    """

    def __init__(
        self,
        images: int,
        translate: int,
        flip: bool,
        generator: torch.Generator,
        cutout: int = 0,
        trivial_augment: float = 0.0,
    ) -> None:
        for name, pixels in (("translate", translate), ("cutout", cutout)):
            if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 <= pixels < 32:
                raise ValueError(
                    f"{name}={pixels!r} is not allowed; use whole pixels from 0 to 31."
                )
        if not 0 <= trivial_augment <= 1:
            raise ValueError(
                f"trivial_augment={trivial_augment!r} is not allowed; use a share from 0 to 1."
            )
        self.translate, self.flip, self.cutout = translate, flip, cutout
        self.trivial_augment = trivial_augment
        self.colour = MEAN_COLOUR
        self.generator = generator
        self.mirrored_first = torch.rand(images, generator=generator) < 0.5

    def __call__(self, images: Tensor, index: Tensor, epoch: int) -> Tensor:
        """Augment uint8 images b×3×32×32, the ones numbered `index` of the set, in an epoch
        counted from 0. Shape and type stay."""
        if self.flip:
            which = self.mirrored_first[index] ^ bool(epoch % 2)
            images = mirror(images, which.to(images.device))
        if self.translate:
            span = 2 * self.translate + 1
            moves = torch.randint(span, (2, len(images)), generator=self.generator) - self.translate
            down, right = moves.to(images.device)
            images = shift(images, down, right)
        if self.trivial_augment:
            which = torch.rand(len(images), generator=self.generator) < self.trivial_augment
            images = alter(images, which, self.generator, self.colour)
        if self.cutout:
            place = torch.randint(images.shape[2], (2, len(images)), generator=self.generator)
            row, column = place.to(images.device)
            images = cover(images, row, column, self.cutout, self.colour)
        return images
