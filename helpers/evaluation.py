"""What a network predicts, how confident it is, and what its weights a depend on, from the logits
of `predict` and the a of `gates`. All shares are fractions of one."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

from helpers.augment import shift
from helpers.data import IMAGE_SIZE, ImageSet, evaluation_loader
from helpers.model import BlockNetwork

PUBLISHED, PUBLISHED_MINUTES = 0.8851, 57  # the published report: test accuracy, GPU minutes
BATCH = 250  # images; on a CPU up to a fifth quicker than 500


def predict(
    network: nn.Module, images: ImageSet,
    precision: torch.dtype = torch.float32, size: int = IMAGE_SIZE,
) -> Tensor:  # fmt: skip
    """Logits, float32 N×classes on the CPU, of images resized to size×size pixels. bfloat16 and
    float16, where the device has them, are quicker and change a few predictions."""
    with evaluating(network, precision) as device:
        loader = evaluation_loader(images, BATCH, size)
        return torch.cat([network(x.to(device)).float() for x, *_ in loader]).cpu()


def six_views(
    network: nn.Module, images: ImageSet, logits: Tensor, precision: torch.dtype
) -> Tensor:
    """`logits`, with those of the least certain quarter of the images replaced by a mean over six
    views: as it is and mirrored, each unmoved, moved up and left, moved down and right by a pixel
    (cifar10-airbench, K. Jordan; that a quarter is enough: hiverge's cifar10-speedrun)."""
    unsure = confidence(logits).argsort()[: math.ceil(len(logits) / 4)]
    some, total = images.subset(unsure.to(images.labels.device)), 0
    for pixels, weight in ((0, 1 / 4), (1, 1 / 8), (-1, 1 / 8)):
        moves = torch.full_like(some.labels, pixels)
        moved = shift(some.images, moves, moves)
        for seen in (moved, moved.flip(3)):
            total = total + weight * predict(network, ImageSet(seen, some.labels), precision)
    return logits.index_copy(0, unsure, total)


@contextlib.contextmanager
def evaluating(network: nn.Module, precision: torch.dtype) -> Iterator[torch.device]:
    """Evaluation mode without gradients, giving the network's device. By default a GPU rounds
    float32 in convolutions to 11 bits (TF32); not here."""
    device, training = next(network.parameters()).device, network.training
    autocast = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    cudnn = torch.backends.cudnn
    kept = {"benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        network.eval()
        with torch.inference_mode(), autocast, cudnn.flags(True, allow_tf32=False, **kept):
            yield device
    finally:
        network.train(training)


# ---- accuracy and mistakes
def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit of each image is that of its label, N booleans on the CPU."""
    return logits.argmax(dim=1) == labels.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of images classified correctly; NaN of no images."""
    return float(is_correct(logits, labels).double().mean())


def interval(right: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share, from `right` of `n` images; 0 to 1 if there are none."""
    bounds = binomtest(right, n).proportion_ci(0.95, method="wilson") if n else (0, 1)
    return float(bounds[0]), float(bounds[1])


def paired_difference(first: Tensor, second: Tensor) -> tuple[float, float, float]:
    """How much more often the first of two networks is right, from `is_correct` of both, and its
    95% interval: Wald's with half an image added to each cell of the 2×2 table (Agresti, Min)."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    gained, differing, n = only_first - only_second, only_first + only_second + 1, len(first) + 2
    half = 1.96 * math.sqrt(differing - gained**2 / n) / n
    return gained / len(first), gained / n - half, gained / n + half


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Counts of images, classes×classes: a row for each true class, a column for each predicted."""
    classes = logits.shape[1]
    pairs = labels.cpu() * classes + logits.argmax(dim=1)
    return pairs.bincount(minlength=classes**2).view(classes, classes).numpy()


def confused_pairs(counts: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Pairs of classes by the mistakes between them, in both directions together, most first."""
    first, second = np.triu_indices(len(names), k=1)
    pairs = [f"{names[i]} – {names[j]}" for i, j in zip(first, second)]
    table = pd.DataFrame({"pair": pairs, "mistakes": (counts + counts.T)[first, second]})
    table["share of mistakes"] = table["mistakes"] / max(table["mistakes"].sum(), 1)
    return table.sort_values("mistakes", ascending=False, kind="stable", ignore_index=True)


def class_table(counts: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Accuracy of each class and its 95% interval, `low` to `high`, from `confusion`."""
    right, n = counts.diagonal(), counts.sum(axis=1)
    table = pd.DataFrame({"images": n}, index=pd.Index(names, name="class"))
    table["accuracy"] = right / table["images"]
    table[["low", "high"]] = [interval(*row) for row in zip(right.tolist(), n.tolist())]
    return table


# ---- confidence and calibration
def confidence(logits: Tensor) -> Tensor:
    """The probability that the network gives to its own prediction, N."""
    return logits.softmax(dim=1).amax(dim=1)


def confident_mistakes(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """The index of the `count` misclassified images of greatest confidence, greatest first."""
    wrong = (~is_correct(logits, labels)).nonzero().flatten()
    return wrong[confidence(logits)[wrong].argsort(descending=True)][:count]


def calibration(logits: Tensor, labels: Tensor, bins: int = 15) -> tuple[pd.DataFrame, float]:
    """Mean `confidence`, `accuracy` and number of `images` in bins of equal width, a row for each
    that is not empty; and the expected calibration error, the mean |accuracy − confidence| over
    images (Guo et al., arXiv 1706.04599)."""
    sure, right = confidence(logits).double().numpy(), is_correct(logits, labels).numpy()
    which = np.minimum((sure * bins).astype(int), bins - 1)
    by_bin = pd.DataFrame({"confidence": sure, "accuracy": right}).groupby(which)
    table = by_bin.mean().assign(images=by_bin.size())
    gap = (table["accuracy"] - table["confidence"]).abs()
    return table, float(np.average(gap, weights=table["images"]))


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which logits / T have the least cross-entropy (Guo et al., arXiv 1706.04599)."""
    logits, labels = logits.double(), labels.cpu()
    loss = lambda log_T: float(F.cross_entropy(logits / math.exp(log_T), labels))  # noqa: E731
    return math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x)


def with_fitted_temperature(logits: Tensor, labels: Tensor) -> tuple[Tensor, list[float]]:
    """Logits, in their order, divided by a temperature fitted to other images: that of the even
    ones to the odd, and of the odd to the even. And the two, fitted to the even and to the odd."""
    even, odd = (fitted_temperature(logits[k::2], labels[k::2]) for k in (0, 1))
    is_even = torch.arange(len(logits)) % 2 == 0
    return logits / torch.where(is_even, odd, even)[:, None], [even, odd]


def selective(logits: Tensor, labels: Tensor) -> pd.DataFrame:
    """Accuracy on the most confident images: a row per image, with the share answered up to it."""
    order = confidence(logits).argsort(descending=True, stable=True)
    right, count = is_correct(logits, labels)[order].numpy(), np.arange(1, len(order) + 1)
    return pd.DataFrame({"answered": count / len(order), "accuracy": right.cumsum() / count})


CORRUPTIONS = {  # and their strengths, from weak to strong
    "noise: σ (grey levels)": [8, 16, 24, 32, 48],
    "blur: σ (pixels)": [0.5, 0.75, 1, 1.5, 2],
    "contrast: factor": [0.75, 0.5, 0.35, 0.25, 0.15],
    "JPEG: quality": [80, 50, 30, 15, 8],
}


def corrupted(images: Tensor, corruption: str, strength: float) -> Tensor:
    """Images, uint8 n×3×h×w on the CPU, after one of `CORRUPTIONS`; the noise is fixed."""
    if corruption.startswith("noise"):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + strength * noise).round().clamp(0, 255).to(torch.uint8)
    if corruption.startswith("blur"):
        return transforms.gaussian_blur(images, 2 * round(3 * strength) + 1, 2 * [strength])
    if corruption.startswith("contrast"):
        return transforms.adjust_contrast(images, strength)
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files):
        transforms.to_pil_image(image).save(file, "jpeg", quality=strength)
    return torch.stack([transforms.pil_to_tensor(Image.open(file)) for file in files])


def robustness(network: nn.Module, images: ImageSet, precision: torch.dtype) -> pd.DataFrame:
    """Accuracy on corrupted images (after Hendrycks and Dietterich, arXiv 1903.12261), with its 95%
    interval, `low` to `high`: a row for each corruption and strength, step 0 for untouched ones."""
    n, untouched, rows = len(images), images.images.cpu(), []
    for corruption, strengths in CORRUPTIONS.items():
        for step, strength in enumerate([math.nan, *strengths]):
            seen = corrupted(untouched, corruption, strength) if step else untouched
            logits = predict(network, ImageSet(seen, images.labels), precision=precision)
            right = int(is_correct(logits, images.labels).sum())
            rows.append((corruption, step, strength, n, right / n, *interval(right, n)))
    columns = ["corruption", "step", "strength", "images", "accuracy", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


# ---- the weights a
def gates(network: BlockNetwork, images: ImageSet) -> list[Tensor]:
    """The weights a of every block for every image: K tensors, float32 N×L on the CPU."""
    with evaluating(network, torch.float32) as device:
        batches = [network.gates(x.to(device)) for x, *_ in evaluation_loader(images, BATCH)]
    return [torch.cat(block).float().cpu() for block in zip(*batches)]


def class_means(a: Tensor, labels: Tensor) -> Tensor:
    """The mean weight of each branch over the images of each class, 10×L."""
    return torch.stack([a[labels.cpu() == c].mean(dim=0) for c in range(10)])


def class_from_gates(a: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression that uses only a, N×L, by cross-validation."""
    from sklearn import linear_model, model_selection, pipeline, preprocessing  # takes a second

    model = linear_model.LogisticRegression(max_iter=1000)
    scaled = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
    folds = model_selection.KFold(5, shuffle=True, random_state=0)
    scores = model_selection.cross_val_score(scaled, a.numpy(), labels.cpu().numpy(), cv=folds)
    return float(scores.mean())


def explained_by_colour(a: Tensor, images: Tensor) -> float:
    """The share of the variance of a, N×L, that a linear regression on the mean and standard
    deviation of red, green and blue explains, by cross-validation; NaN for a constant a."""
    from sklearn import linear_model, metrics, model_selection

    if float(a.std(dim=0).max()) < 1e-6:
        return math.nan
    colour = torch.cat(torch.std_mean(images.cpu().flatten(2).float(), dim=2), dim=1).numpy()
    folds = model_selection.KFold(5, shuffle=True, random_state=0)
    model = linear_model.LinearRegression()
    predicted = model_selection.cross_val_predict(model, colour, a.numpy(), cv=folds)
    return float(metrics.r2_score(a.numpy(), predicted, multioutput="variance_weighted"))


def with_replaced_gates(
    network: BlockNetwork, a: Sequence[Tensor], what: str, among: Sequence[int] = ()
) -> BlockNetwork:
    """A copy of the network whose blocks `among` (numbered from 1; all if empty) ignore the image's
    own a: `"mean"` uses the mean of the given a, `"shuffled"` that of the image before it."""
    changed = copy.deepcopy(network)
    for k in among or range(1, len(a) + 1):
        block, mean = changed.blocks[k - 1], a[k - 1].mean(dim=0)
        gates_of = {
            "mean": lambda x, mean=mean: mean.to(x.device).expand(len(x), -1),
            "shuffled": lambda x, own=block.gate: own(x).roll(1, dims=0),
        }
        block.gate = gates_of[what]
    return changed
