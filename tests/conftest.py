"""What all tests share: they download nothing, and write no records into the project."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import project
from helpers.data import ImageData, ImageSet

CLOSED_PORT = "http://127.0.0.1:9"  # a proxy that is not there: what goes through it fails at once
os.environ.update(
    dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED_PORT)
    | dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1")
)
if os.environ.get("CIFAR10_ROOT"):  # for copies of the project too
    os.environ["CIFAR10_ROOT"] = str(Path(os.environ["CIFAR10_ROOT"]).resolve())


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that takes the place of `notebooks/runs`."""
    monkeypatch.setattr(project, "RUNS", tmp_path / "runs")
    project.RUNS.mkdir()
    return project.RUNS


def make_images() -> ImageData:
    """160 training and 70 test images of noise with their class's colour, all different."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for n in (160, 70):
        labels = torch.arange(n) % 10
        colour = 25 * labels.view(-1, 1, 1, 1) * torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
        noise = 40 * torch.randn(n, 3, 32, 32, generator=generator)
        pixels = (128 + 0.4 * colour + noise).clamp(0, 255).to(torch.uint8)
        sets.append(ImageSet(pixels, labels))
    return ImageData("stand-in", *sets)


@pytest.fixture(scope="session")
def images() -> ImageData:
    return make_images()


@pytest.fixture(scope="session")
def copy_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh copy of what a report needs: helpers, notebooks, presets, tables; no runs."""

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("project")
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*-seed*")
        for part in ("helpers", "notebooks"):
            shutil.copytree(project.ROOT / part, folder / part, ignore=unwanted)
        return folder

    return copy
