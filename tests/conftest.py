"""What all tests share: they download nothing, and they run notebooks in a copy of the project."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import data, runs

CLOSED_PORT = "http://127.0.0.1:9"  # a proxy that is not there: what goes through it fails at once
NO_NETWORK = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED_PORT),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "localhost,127.0.0.1"),
}


def committed_alone(folder: Path) -> Path:
    """A folder with links to what git knows of a folder of records, so that the texts are held
    against these, and not against what somebody has trained or measured since. The folder itself
    where there is no git."""
    if not shutil.which("git"):
        return folder
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=data.ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        return folder
    kept = Path(tempfile.mkdtemp(prefix="records-"))
    atexit.register(shutil.rmtree, kept)
    for name in {(data.ROOT / path).relative_to(folder).parts[0] for path in listed}:
        (kept / name).symlink_to(folder / name)
    return kept


runs.RUNS, runs.BENCHMARKS = map(committed_alone, (runs.RUNS, runs.BENCHMARKS))
os.environ.update(NO_NETWORK)
os.environ["CIFAR10_ROOT"] = str(data.cifar10_folder().resolve())  # for copies of the project too
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(scope="session")
def copy_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a fresh copy of what a report needs: helpers, notebooks, presets and the study's
    records, which notebook 05 shows; no other runs."""

    def copy() -> Path:
        folder = tmp_path_factory.mktemp("project")
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs")
        for part in ("helpers", "notebooks"):
            shutil.copytree(data.ROOT / part, folder / part, ignore=unwanted)
        (folder / "notebooks" / "runs").mkdir()
        for record in (data.ROOT / "notebooks" / "runs").glob("study-*"):
            shutil.copytree(record, folder / "notebooks" / "runs" / record.name)
        return folder

    return copy


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python <arguments>` in a folder, with the helpers of the copy `project`."""

    def run(
        *arguments: str | Path, project: Path, cwd: Path, **environment: str
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(project)} | environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )

    return run


@pytest.fixture(scope="session")
def tiny_images() -> data.ImageData:
    return small_images()


def small_images() -> data.ImageData:
    """160 training and 70 test images of noise with their class's colour, all different."""
    generator = torch.Generator().manual_seed(0)
    sets = []
    for n in (160, 70):
        labels = torch.arange(n) % 10
        colour = 25 * labels.view(-1, 1, 1, 1) * torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
        noise = 40 * torch.randn(n, 3, 32, 32, generator=generator)
        images = (128 + 0.4 * colour + noise).clamp(0, 255).to(torch.uint8)
        sets.append(data.ImageSet(images, labels))
    return data.ImageData("stand-in", *sets)
