"""How a batch of training images is varied, all at once: mirrored, shifted, covered, shrunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import autocontrast, equalize, rgb_to_grayscale

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
    colour = colour.to(images, non_blocking=True)
    return torch.where(covered, colour.view(1, -1, 1, 1), images)


def alter(images: Tensor, which: Tensor, generator: torch.Generator, colour: Tensor) -> Tensor:
    """Alter those of b×3×h×w uint8 images where `which`, b booleans, is true: each by one operation
    of any strength, such as a turn, a shear, a change of contrast or of sharpness (TrivialAugment:
    S. Müller and F. Hutter, arXiv 2103.10158; operations and ranges are those of torchvision's
    TrivialAugmentWide).

    Args:
        images: on any device, which is not waited for; h and w are at least 3.
        which: on the CPU.
        generator: of the CPU and the only source of randomness; whatever `which` says, b operations
            and b settings are drawn, so that no image's fate depends on another's.
        colour: 3 values 0…255 on the CPU, of what comes in at the rim.
    """
    operation = torch.randint(len(OPERATIONS), which.shape, generator=generator)
    setting = torch.randint(2 * BINS, which.shape, generator=generator)
    operation = torch.where(which, operation, OPERATIONS.index("Identity"))
    return operate(images, operation, setting, colour)


def operate(images: Tensor, operation: Tensor, setting: Tensor, colour: Tensor) -> Tensor:
    """b×3×h×w uint8 images, each altered by its own of the `OPERATIONS`; h and w are at least 3.

    Args:
        images: on any device; the rest is on the CPU.
        operation: b numbers of operations.
        setting: b numbers of columns of `MAGNITUDES`, 0 to 2·BINS − 1.
        colour: 3 values 0…255, of what comes in at the rim.
    """
    order = operation.argsort(stable=True)  # so that those of one operation are a slice
    counts = operation.bincount(minlength=len(OPERATIONS)).tolist()
    moved, counts = sum(counts[: len(MOVES)]), counts[len(MOVES) :]
    operation, magnitude = operation[order], MAGNITUDES[operation, setting][order]
    sources = source_matrices(operation[:moved], magnitude[:moved], *images.shape[2:])
    # A GPU gets all the numbers here and is never asked for one: it would be waited for.
    order, back, magnitude, sources, colour = (
        numbers.to(images.device, non_blocking=True)
        for numbers in (order, order.argsort(), magnitude.view(-1, 1, 1, 1), sources, colour)
    )
    images = images[order]
    altered = [warp(images[:moved], sources, colour)]
    parts = zip(images[moved:].split(counts), magnitude[moved:].split(counts))
    for (change, _), part in zip(RECOLOURINGS.values(), parts):
        altered.append(change(*part))
    return torch.cat(altered)[back]


def source_matrices(move: Tensor, magnitude: Tensor, h: int, w: int) -> Tensor:
    """n×2×3 matrices which say, for each of n h×w images, from where a pixel of the altered image
    comes: from its (x, y, 1), in pixels right of and below the image's centre, they make the (x, y)
    in the image as it was.

    Args:
        move: n numbers of `MOVES`.
        magnitude: n values: a shear's slope, whole pixels, or degrees against the clock.
    """
    # One of an image's five is not 0, so that all the moves have one formula.
    amounts = F.one_hot(move, len(MOVES)) * magnitude.double().view(-1, 1)
    shear_x, shear_y, right, down, degrees = amounts.unbind(1)
    # Shears leave the upper left corner where it is, at (−w/2, −h/2); turns leave the centre.
    angle = degrees.deg2rad()
    to_x = (angle.cos(), shear_x - angle.sin(), shear_x * (h / 2) - right)
    to_y = (angle.sin() + shear_y, angle.cos(), shear_y * (w / 2) - down)
    return torch.stack(to_x + to_y, dim=1).view(-1, 2, 3).float()


def warp(images: Tensor, sources: Tensor, colour: Tensor) -> Tensor:
    """Fetch each pixel of n×3×h×w uint8 images from the nearest to where n×2×3 `source_matrices`
    say; from outside of the image comes the colour, 3 values."""
    h, w = images.shape[2:]
    x, y = (torch.arange(n, device=images.device) - (n - 1) / 2 for n in (w, h))
    # No matrix product, which a GPU may round too coarsely to hit the right pixel.
    a, b, c = sources.view(-1, 2, 3, 1, 1).unbind(2)  # n×2×1×1 each
    place = a * x + b * y.view(-1, 1) + c  # n×2×h×w
    grid = torch.stack((place[:, 0] / (w / 2), place[:, 1] / (h / 2)), dim=3)
    # What comes in is 0, so the colour is made the 0; differences of bytes are exact in float32.
    colour = colour.view(1, -1, 1, 1)
    fetched = F.grid_sample(images - colour, grid, "nearest", "zeros", align_corners=False)
    return fetched.add_(colour).round_().to(torch.uint8)


def leave(images: Tensor, _: Tensor) -> Tensor:
    """The images as they are."""
    return images


def change_brightness(images: Tensor, amount: Tensor) -> Tensor:
    """`push_apart` images and black."""
    return push_apart(images, torch.zeros_like(amount), amount)


def change_saturation(images: Tensor, amount: Tensor) -> Tensor:
    """`push_apart` images and their shades of grey."""
    return push_apart(images, rgb_to_grayscale(images).float(), amount)


def change_contrast(images: Tensor, amount: Tensor) -> Tensor:
    """`push_apart` images and their mean grey."""
    grey = rgb_to_grayscale(images).float().mean(dim=(2, 3), keepdim=True)
    return push_apart(images, grey, amount)


def push_apart(images: Tensor, other: Tensor, amount: Tensor) -> Tensor:
    """images + amount · (images − other) as bytes, cut off: all of `other` where the amount is −1.

    Args:
        images: n×3×h×w bytes.
        other: floats whose shape broadcasts to that of the images.
        amount: n×1×1×1 floats.
    """
    # Products and sum as torchvision rounds them: the fraction is cut off, so a last bit counts.
    return to_bytes(torch.addcmul(images * (1 + amount), other, -amount))


def change_sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """n×3×h×w images pushed away from themselves blurred by the amount, n×1×1×1, or if it is
    negative towards them; the outermost pixels stay as they are."""
    pixels = images.float()
    inner = pixels[:, :, 1:-1, 1:-1]
    # The sum over 3×3 pixels, in which the middle one is to count five times; exact in float32.
    blurred = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1).add_(inner, alpha=4)
    blurred = blurred.div_(13).round_()
    inner.addcmul_(blurred.sub_(inner), -amount)
    return to_bytes(pixels)


def to_bytes(values: Tensor) -> Tensor:
    """Floats as bytes, without their fraction and cut off at 0 and 255; overwrites the floats."""
    return values.clamp_(0, 255).to(torch.uint8)


def posterize(images: Tensor, mask: Tensor) -> Tensor:
    """Of each byte of n×3×h×w images the bits that are set in the mask, n×1×1×1 floats."""
    return images & mask.to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the bytes of n×3×h×w images that are not below the threshold, n×1×1×1 floats."""
    return torch.where(images >= threshold, ~images, images)


BINS = 31  # strengths of an operation, drawn with the same chance


def both_signs(last: float) -> Tensor:
    """Evenly spaced magnitudes: BINS from 0 to `last`, and the same of the other sign."""
    magnitudes = torch.linspace(0, last, BINS)
    return torch.cat((magnitudes, -magnitudes))


NONE = torch.zeros(2 * BINS)
BITS_LEFT = (8 - torch.arange(BINS) / ((BINS - 1) / 6)).round()  # by posterizing: 8 … 2
MASKS = (256 - 2 ** (8 - BITS_LEFT)).repeat(2)
THRESHOLDS = (255 * torch.linspace(1, 0, BINS)).repeat(2)

# The operations and their 2·BINS magnitudes, by torchvision's names. Where it draws no sign, the
# BINS are there twice, and either is as likely.
MOVES = {
    "ShearX": both_signs(0.99),
    "ShearY": both_signs(0.99),
    "TranslateX": both_signs(32).trunc(),
    "TranslateY": both_signs(32).trunc(),
    "Rotate": both_signs(135),
}
RECOLOURINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "Identity": (leave, NONE),
    "Brightness": (change_brightness, both_signs(0.99)),
    "Color": (change_saturation, both_signs(0.99)),
    "Contrast": (change_contrast, both_signs(0.99)),
    "Sharpness": (change_sharpness, both_signs(0.99)),
    "Posterize": (posterize, MASKS),
    "Solarize": (solarize, THRESHOLDS),
    "AutoContrast": (lambda images, _: autocontrast(images), NONE),
    "Equalize": (lambda images, _: equalize(images), NONE),
}
OPERATIONS = (*MOVES, *RECOLOURINGS)  # in the order of their numbers
MAGNITUDES = torch.stack([*MOVES.values(), *(values for _, values in RECOLOURINGS.values())])


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
            images = mirror(images, which.to(images.device, non_blocking=True))
        if self.translate:
            span = 2 * self.translate + 1
            moves = torch.randint(span, (2, len(images)), generator=self.generator) - self.translate
            down, right = moves.to(images.device, non_blocking=True)
            images = shift(images, down, right)
        if self.trivial_augment:
            which = torch.rand(len(images), generator=self.generator) < self.trivial_augment
            images = alter(images, which, self.generator, self.colour)
        if self.cutout:
            place = torch.randint(images.shape[2], (2, len(images)), generator=self.generator)
            row, column = place.to(images.device, non_blocking=True)
            images = cover(images, row, column, self.cutout, self.colour)
        return images
