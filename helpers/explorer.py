"""The explorer: one page, working offline, on which test images can be filtered and looked into."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from helpers import data, evaluation, runs

PAGE = Path(__file__).with_name("explorer.html")
SHOWN = 300  # images: every one takes about 3 kB of the page
COLUMNS = 20  # of the picture that holds them all


def write_explorer(run: runs.Run, images: data.ImageData, target: Path) -> None:
    """Write the page of a run, `target`, which needs nothing beside itself.

    Raises:
        RunError: the run's weights are not there or cannot be read.
    """
    content = json.dumps(explorer_content(run, images), separators=(",", ":"))
    page = PAGE.read_text(encoding="utf-8")
    # In a script, "</" could end it.
    target.write_text(page.replace("{{ content }}", content.replace("</", "<\\/")), "utf-8")


def explorer_content(run: runs.Run, images: data.ImageData) -> dict[str, Any]:
    """What the page shows: the images in one picture, and for each of them the network's answer.

    Numbers are fractions of one, rounded to a thousandth.
    """
    network = runs.load_network(run)
    logits, labels = evaluation.predict(network, images.test), images.test.labels
    probabilities, a = logits.softmax(dim=1), evaluation.gates(network, images.test)
    shown = chosen(logits, labels)
    means = [evaluation.class_means(block, labels) for block in a]
    right = evaluation.correct(logits, labels)
    return {
        "run": run.name,
        "dataset": "CIFAR-10" if images.name == "cifar10" else "STAND-IN DATA, not CIFAR-10",
        "accuracy": f"{right / len(labels):.2%} of {len(labels):,} test images",
        "classes": list(images.classes),
        "columns": COLUMNS,
        "picture": as_png(images.test.images[shown]),
        "kernels": [[f"{c.kernel_size[0]}×{c.kernel_size[0]}" for c in block.branches]
                    for block in network.blocks],
        "class_means": [rounded(mean) for mean in means],
        "images": [
            {"number": i, "label": int(labels[i]), "answer": int(logits[i].argmax()),
             "probabilities": rounded(probabilities[i]), "a": [rounded(block[i]) for block in a]}
            for i in shown.tolist()
        ],
    }  # fmt: skip


def chosen(logits: Tensor, labels: Tensor, count: int = SHOWN, seed: int = 0) -> Tensor:
    """Numbers of the images to show: half of them drawn among the mistakes, half among all others
    (fewer, if there are not so many), in the order of the test set."""
    generator = torch.Generator().manual_seed(seed)
    wrong = logits.argmax(dim=1) != labels
    parts = []
    for which in (wrong, ~wrong):
        numbers = which.nonzero().flatten()
        order = torch.randperm(len(numbers), generator=generator)
        parts.append(numbers[order[: count // 2]])
    return torch.cat(parts).sort().values


def as_png(images: Tensor) -> str:
    """Images, uint8 n×3×h×w, side by side in rows of `COLUMNS`, as a data URL."""
    n, _, h, w = images.shape
    rows = -(-n // COLUMNS)
    grid = torch.zeros(rows * COLUMNS, 3, h, w, dtype=torch.uint8)
    grid[:n] = images
    picture = grid.view(rows, COLUMNS, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, -1, 3)
    file = io.BytesIO()
    Image.fromarray(picture.numpy()).save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def rounded(values: Tensor) -> list:
    return (values.double() * 1000).round().div(1000).tolist()
