"""Questions put to a trained network: worse images, covered images, and what it takes for alike."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from helpers import evaluation
from helpers.augment import cover
from helpers.data import MEAN_COLOUR, ImageSet
from helpers.model import BlockNetwork


def noisy(images: Tensor, levels: float, generator: torch.Generator) -> Tensor:
    """Images, uint8 n×3×h×w, with Gaussian noise of that standard deviation, in levels of 255."""
    noise = torch.randn(images.shape, generator=generator)
    return (images + levels * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    """Images, uint8 n×3×h×w, under a Gaussian blur of that standard deviation, in pixels."""
    size = 2 * round(3 * sigma) + 1
    return transforms.gaussian_blur(images, [size, size], [sigma, sigma])


def faded(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    """Images, uint8 n×3×h×w, their contrast multiplied, around the mean grey of each."""
    return transforms.adjust_contrast(images, factor)


def compressed(images: Tensor, quality: float, _: torch.Generator) -> Tensor:
    """What JPEG of that quality, 1 to 100, leaves of images, uint8 n×3×h×w on the CPU."""
    left = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=int(quality))
        left.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(left)


# How images are made worse, and how much, from weak to strong.
CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], list[float]]] = {
    "noise: deviation, levels": (noisy, [8, 16, 24, 32, 48]),
    "blur: deviation, pixels": (blurred, [0.5, 0.75, 1, 1.5, 2]),
    "contrast: factor": (faded, [0.75, 0.5, 0.35, 0.25, 0.15]),
    "JPEG: quality": (compressed, [80, 50, 30, 15, 8]),
}


def robustness(
    network: nn.Module,
    images: ImageSet,
    seed: int = 0,
    precision: torch.dtype = torch.float32,
) -> pd.DataFrame:
    """Accuracy on images that are made worse (after Hendrycks and Dietterich, arXiv 1903.12261).

    Args:
        seed: of the noise.
        precision: of the maps, see `evaluation.predict`.

    Returns:
        a row for each corruption and strength: `corruption`, `step` (0: as they are, 1 … 5),
        `strength`, `images`, `accuracy` with its 95% interval, `low` and `high` (fractions of one).
    """
    rows = []

    def right_of(seen: ImageSet) -> int:
        return evaluation.correct(
            evaluation.predict(network, seen, precision=precision), seen.labels
        )

    untouched = right_of(images)
    for corruption, (make_worse, strengths) in CORRUPTIONS.items():
        generator = torch.Generator().manual_seed(seed)
        for step, strength in enumerate([None, *strengths]):
            right = untouched
            if strength is not None:
                worse = make_worse(images.images, strength, generator)
                right = right_of(ImageSet(worse, images.labels))
            low, high = evaluation.interval(right, len(images))
            rows.append(
                {"corruption": corruption, "step": step, "strength": strength,
                 "images": len(images), "accuracy": right / len(images), "low": low, "high": high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def occlusion(
    network: nn.Module,
    image: Tensor,
    answer: int,
    side: int = 8,
    step: int = 2,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """How much of the probability of an answer is lost when a square of the image is covered
    (Zeiler and Fergus, arXiv 1311.2901): the square with its centre there, in the mean colour.

    Args:
        image: uint8 3×h×w.
        answer: the class.
        side: of the square, in pixels.
        step: pixels between two centres.
        precision: of the maps, see `evaluation.predict`.

    Returns:
        losses, fractions of one, a row for each centre from step // 2 to h − 1 and a column for
        each to w − 1; below 0 where covering helps.
    """
    h, w = image.shape[1:]
    rows, columns = torch.meshgrid(
        torch.arange(step // 2, h, step), torch.arange(step // 2, w, step), indexing="ij"
    )
    copies = image.expand(rows.numel(), -1, -1, -1)
    covered = cover(copies, rows.flatten(), columns.flatten(), side, MEAN_COLOUR)
    both = torch.cat([image[None], covered])
    labels = torch.full((len(both),), answer)
    logits = evaluation.predict(network, ImageSet(both, labels), precision=precision)
    probability = logits.softmax(dim=1)[:, answer]
    return (probability[0] - probability[1:]).view(rows.shape)


def logits_and_means(network: BlockNetwork, images: ImageSet) -> tuple[Tensor, Tensor]:
    """The logits, N×classes, as of `evaluation.predict`, and what the output block makes them of:
    the means of the last map's channels, float32 N×C."""
    kept: list[Tensor] = []
    first = network.output.fc[0]
    hook = first.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    try:
        logits = evaluation.predict(network, images)
    finally:
        hook.remove()
    return logits, torch.cat(kept)


def nearest(some: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each row of `some`, n×C, the `count` rows of `others` with the largest cosine.

    Returns:
        their numbers and their cosines, n×count each, nearest first.
    """
    cosines = F.normalize(some, dim=1) @ F.normalize(others, dim=1).T
    largest = cosines.topk(count, dim=1)
    return largest.indices, largest.values
