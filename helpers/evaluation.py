"""Exact metrics: what a network answers to a set of images, and how right it is."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import confusion_matrix, make_scorer, r2_score
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from helpers.augment import mirror, shift
from helpers.data import ImageSet, evaluation_loader
from helpers.model import IntermediateBlock, check_choice, stacked_kernels

# What the published answer to the same sheet states: test accuracy (a fraction of one), minutes of
# training on a GPU, and multiply-adds: 35 epochs of 50,000 images, 4.08e9 for each and direction.
PUBLISHED, PUBLISHED_MINUTES, PUBLISHED_WORK = 0.8851, 57, 35 * 50_000 * 3 * 4.08e9

# mirrored, down, right, weight: the image and its mirror image, as they are and moved by a pixel
# along the diagonal (the views of cifar10-airbench).
AS_IS = ((False, 0, 0, 1.0),)
TTA = tuple(
    (mirrored, pixels, pixels, 0.25 if pixels == 0 else 0.125)
    for mirrored in (False, True)
    for pixels in (0, -1, 1)
)


@torch.inference_mode()
def predict(
    network: nn.Module,
    images: ImageSet,
    device: torch.device | str = "cpu",
    views: tuple[tuple[bool, int, int, float], ...] = AS_IS,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Logits, float32 N×classes on the CPU, in the images' order, with the network in evaluation
    mode.

    Args:
        views: `AS_IS`, or `TTA` for the weighted mean of the logits of six views of each image
            (test-time augmentation).
        precision: of the maps; bfloat16 is faster where the device calculates with it, and turns
            some of the answers.
    """
    half, of_views = precision == torch.bfloat16, []
    for mirrored, down, right, weight in views:
        seen = view(images, mirrored, down, right)
        autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=half)
        with evaluating(network), autocast, exact_convolutions():
            batches = [network(x.to(device)).float().cpu() for x, *_ in evaluation_loader(seen)]
        of_views.append(weight * torch.cat(batches))
    return sum(of_views[1:], start=of_views[0])


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Let the network be in evaluation mode, and afterwards in the mode in which it was."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """Let convolutions of float32 calculate with float32: on a GPU they would round what they
    multiply to 11 binary digits, and turn a few answers."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def view(images: ImageSet, mirrored: bool, down: int, right: int) -> ImageSet:
    """The images, mirrored or not, moved by whole pixels."""
    seen, n = images.images, len(images)
    if mirrored:
        seen = mirror(seen, torch.ones(n, dtype=torch.bool, device=seen.device))
    if down or right:
        moves = torch.tensor([[down], [right]], device=seen.device).expand(2, n)
        seen = shift(seen, moves[0], moves[1])
    return ImageSet(seen, images.labels)


def correct(logits: Tensor, labels: Tensor) -> int:
    """How many images have their largest logit at their label: a count, never a mean of means."""
    return int((logits.argmax(dim=1) == labels.cpu()).sum())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images classified correctly, a fraction of one."""
    return correct(logits, labels) / len(labels)


def interval(right: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share, from `right` of `n` images; fractions of one."""
    bounds = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(bounds.low), float(bounds.high)


def mean_and_deviation(values: pd.Series, digits: int) -> str:
    """Mean and standard deviation (n − 1) of runs as text; of one run, its value alone."""
    mean = f"{values.mean():.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():.{digits}f}"


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """How much more often the first of two networks is right, with its 95% interval; fractions.

    Only the images that one of them has right and the other wrong say anything. The interval is
    Wald's for paired proportions after half an image has been added to each of the four cells of
    the table of both networks' answers (Agresti and Min, Statistics in Medicine 2005), without
    which it is too narrow where few images tell them apart.

    Args:
        first, second: N booleans each, whether they had the same N images right.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    gained, apart, n = only_first - only_second, only_first + only_second + 1, len(first) + 2
    half = 1.96 * math.sqrt(apart - gained**2 / n) / n
    return gained / len(first), gained / n - half, gained / n + half


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Counts of images, 10×10: a row for each true class, a column for each answer."""
    return confusion_matrix(labels.cpu().numpy(), logits.argmax(dim=1).numpy(), labels=range(10))


def confused_pairs(counts: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Pairs of classes by the number of mistakes between them, in both directions, most first.

    Columns: `pair`, `mistakes`, `share of mistakes` (a fraction of one).
    """
    first, second = np.triu_indices(len(names), k=1)
    mistakes = (counts + counts.T)[first, second]
    all_mistakes = max(counts.sum() - np.trace(counts), 1)
    pairs = pd.DataFrame(
        {
            "pair": [f"{names[i]} – {names[j]}" for i, j in zip(first, second)],
            "mistakes": mistakes,
            "share of mistakes": mistakes / all_mistakes,
        }
    )
    return pairs.sort_values("mistakes", ascending=False, kind="stable", ignore_index=True)


def class_table(counts: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Accuracy of each class with its 95% interval, from the counts of `confusion`.

    Index: the class; columns `images`, `accuracy`, `low`, `high` (fractions of one).
    """
    rows = []
    for k, name in enumerate(names):
        right, n = int(counts[k, k]), int(counts[k].sum())
        low, high = interval(right, n)
        rows.append({"class": name, "images": n, "accuracy": right / n, "low": low, "high": high})
    return pd.DataFrame(rows).set_index("class")


def confidence(logits: Tensor) -> Tensor:
    """The probability that the network gives to its own answer, N."""
    return logits.softmax(dim=1).amax(dim=1)


def confident_mistakes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The numbers of the `count` wrongly classified images with the greatest confidence in
    the wrong answer, greatest first (fewer, if fewer are wrong)."""
    wrong = (logits.argmax(dim=1) != labels.cpu()).nonzero().flatten()
    return wrong[confidence(logits)[wrong].argsort(descending=True)][:count]


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width; empty bins are left out."""

    confidence: np.ndarray  # mean in each bin
    accuracy: np.ndarray  # share right in each bin
    count: np.ndarray  # images in each bin
    error: float  # expected calibration error: mean |accuracy − confidence| over images


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Calibration of the answers (Guo et al., arXiv 1706.04599)."""
    sure = confidence(logits).double().numpy()
    right = (logits.argmax(dim=1) == labels.cpu()).double().numpy()
    which = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(which, minlength=bins)
    filled = count > 0
    mean_sure = np.bincount(which, sure, bins)[filled] / count[filled]
    mean_right = np.bincount(which, right, bins)[filled] / count[filled]
    error = float(np.abs(mean_right - mean_sure) @ count[filled] / len(sure))
    return Calibration(mean_sure, mean_right, count[filled], error)


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which logits / T have the least cross-entropy (Guo et al., arXiv 1706.04599)."""

    def loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits.double() / math.exp(log_temperature), labels.cpu()))

    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def with_fitted_temperature(logits: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Logits divided by a temperature that other images gave: each half's fits the other half.

    So no image has a say in its own temperature, though no image was held out of the training.

    Returns:
        the divided logits, in their order, and the two temperatures.
    """
    halves = torch.arange(len(logits)) % 2 == 0, torch.arange(len(logits)) % 2 == 1
    temperatures = [fitted_temperature(logits[half], labels.cpu()[half]) for half in halves]
    divided = logits.clone()
    for half, temperature in zip(halves, reversed(temperatures)):
        divided[half] /= temperature
    return divided, temperatures


def answered(logits: Tensor, labels: Tensor) -> pd.DataFrame:
    """Accuracy on the images of which the network is surest, for every number of them.

    A row an image, surest first: `answered` (the share of images up to it), `accuracy` of those,
    and `confidence` in its own answer; fractions of one.
    """
    sure, order = confidence(logits).sort(descending=True, stable=True)
    right = (logits.argmax(dim=1) == labels.cpu())[order].double()
    count = torch.arange(1, len(labels) + 1)
    columns = {"answered": count / len(labels), "accuracy": right.cumsum(0) / count}
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()}).assign(
        confidence=sure.numpy()
    )


@torch.inference_mode()
def gates(network: nn.Module, images: ImageSet) -> list[Tensor]:
    """The weights a of each intermediate block for each image: K tensors, float32 N×L on the CPU,
    with the network in evaluation mode."""
    with evaluating(network), exact_convolutions():
        batches = [network.gates(x) for x, *_ in evaluation_loader(images)]
    return [torch.cat(block).float().cpu() for block in zip(*batches)]


def entropy(a: Tensor) -> Tensor:
    """The entropy of the weights of each image as a share of its maximum log L, N.

    1 when all branches weigh alike, 0 when one branch has all the weight. Weights of a linear
    or sigmoid gate are taken by their size: |aₗ| / Σ|aₗ|. Not defined (NaN) for L = 1.
    """
    share = a.abs() / a.abs().sum(dim=1, keepdim=True)
    return torch.special.entr(share).sum(dim=1) / np.log(a.shape[1])


def leading_shares(a: Tensor) -> Tensor:
    """The share of the images for which each branch has the largest |aₗ|, L."""
    return a.abs().argmax(dim=1).bincount(minlength=a.shape[1]) / len(a)


def driving(a: Tensor, count: int) -> Tensor:
    """The numbers of the images with the largest weight for each branch, L×count, largest first."""
    return a.topk(count, dim=0).indices.t()


def kernel_similarity(block: IntermediateBlock, middle: bool = False) -> Tensor:
    """The mean cosine between the kernels of any two branches, each bank out×in×k×k taken as one
    vector, smaller kernels with zeros around them; NaN where L = 1.

    Args:
        middle: compare them only where all have a weight, in the square of the smallest kernel.
    """
    weights = [branch.weight for branch in block.branches]
    banks = stacked_kernels(weights, block.fc.weight.dtype).detach()
    if middle:
        smallest = min(branch.kernel_size[0] for branch in block.branches)
        rim = (banks.shape[-1] - smallest) // 2
        banks = banks[..., rim : rim + smallest, rim : rim + smallest]
    banks = banks.flatten(1)
    cosines = [
        torch.cosine_similarity(one, other, dim=0)
        for one, other in itertools.combinations(banks, 2)
    ]
    return torch.stack(cosines).mean() if cosines else torch.tensor(float("nan"))


def class_means(a: Tensor, labels: Tensor) -> Tensor:
    """The mean weight of each branch over the images of each class, 10×L."""
    return torch.stack([a[labels.cpu() == c].mean(dim=0) for c in range(10)])


def class_from_gates(a: Tensor, labels: Tensor) -> float:
    """How far a block's a alone, N×L, tells the class: accuracy of a logistic regression on images
    that it was not fitted to (cross-validation), a fraction of one."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(cross_val_score(model, a.numpy(), labels.cpu().numpy(), cv=5).mean())


def explained_by_colour(a: Tensor, images: Tensor) -> float:
    """The share of the variance of a block's a, N×L, all branches together, that a linear function
    of the mean and the standard deviation of red, green and blue explains, on images that it was
    not fitted to.

    Not defined (NaN) for an a that is the same for all images.

    Args:
        images: uint8 N×3×h×w.
    """
    if float(a.std(dim=0).max()) < 1e-6:
        return math.nan
    pixels = images.cpu().flatten(2).float()
    colour = torch.cat([pixels.mean(dim=2), pixels.std(dim=2)], dim=1)
    model = make_pipeline(StandardScaler(), LinearRegression())
    folds = KFold(5, shuffle=True, random_state=0)
    share = make_scorer(r2_score, multioutput="variance_weighted")
    return float(cross_val_score(model, colour.numpy(), a.numpy(), cv=folds, scoring=share).mean())


def with_replaced_gates(
    network: nn.Module, a: Sequence[Tensor], what: str, among: Sequence[int] = ()
) -> nn.Module:
    """A copy of the network in which every image gets other weights than its own.

    Args:
        a: the weights that `gates` gave, K tensors N×L.
        what: `"mean"`: each block's mean over the images, of `a`; `"shuffled"`: the weights that
            the block computes for the image before it in the batch, whose x has come through the
            same disturbed blocks.
        among: numbers (from 1) of the blocks in which that is done; all, if none are named.

    Raises:
        ValueError: another `what`, a block that the network does not have, or weights of another
            number of blocks.
    """
    check_choice("what", what, ("mean", "shuffled"))
    K = len(network.blocks)
    if not set(among) <= set(range(1, K + 1)):
        raise ValueError(f"among={list(among)!r} is not allowed; blocks are 1 to {K}.")
    if len(a) != K:
        raise ValueError(f"a has the weights of {len(a)} blocks, and the network has {K}.")
    changed = copy.deepcopy(network)
    for number, (block, weights) in enumerate(zip(changed.blocks, a, strict=True), start=1):
        if among and number not in among:
            continue
        if what == "mean":
            mean = weights.mean(dim=0)
            block.gate = lambda x, mean=mean: mean.expand(len(x), -1)
        else:
            own = block.gate
            block.gate = lambda x, own=own: own(x).roll(1, dims=0)
    return changed
