"""How a batch of training images is varied, all at once: mirrored, shifted, shrunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def shrink(images: Tensor, size: int) -> Tensor:
    """b×c×h×w images of floats as b×c×size×size: each pixel the mean of those that it covers.

    To learn from small images first takes less time (progressive resizing: J. Howard, fast.ai, in
    the DAWNBench competition of 2018).
    """
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, size=(size, size), mode="area")


class Augmentation:
    """Alternating mirror and random shift for a training set of known size.

    Whether an image is mirrored in its first epoch is drawn; from then on it alternates, so
    that any two epochs in a row show every image both ways (cifar10-airbench, K. Jordan).

    Args:
        images: size N of the training set.
        translate: largest shift in pixels, in both directions; 0 for none.
        flip: whether to mirror.
        generator: the only source of randomness here.

    Raises:
        ValueError: a translation that is not 0 to 31 whole pixels.
    """

    def __init__(self, images: int, translate: int, flip: bool, generator: torch.Generator) -> None:
        if isinstance(translate, bool) or not isinstance(translate, int) or not 0 <= translate < 32:
            raise ValueError(
                f"translate={translate!r} is not allowed; use whole pixels from 0 to 31."
            )
        self.translate, self.flip, self.generator = translate, flip, generator
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
        return images
