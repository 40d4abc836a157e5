"""Files and downloads, the stand-in, splits, loaders and nearest images."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import shutil
import socket
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from helpers import data
from helpers.augment import Augmentation
from helpers.data import ImageData
from helpers.project import ProjectError
from helpers.settings import Settings

FOLDER, ARCHIVE = CIFAR10.base_folder, CIFAR10.filename
URLOPEN = urllib.request.urlopen
STATUS = {"busy": 503}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small() -> ImageData:
    return data.stand_in(training=2000, test=500)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """source/ holds CIFAR-10 with two images a file, and its archive; there is no network."""
    source, rng = tmp_path / "source" / FOLDER, np.random.default_rng(0)
    source.mkdir(parents=True)

    def file(name: str) -> tuple[str, str]:
        pixels = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        (source / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 8]}))
        return name, hashlib.md5((source / name).read_bytes()).hexdigest()

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(CIFAR10, "train_list", [file(f"data_batch_{k}") for k in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [file("test_batch")])
    archive = tmp_path / "source" / ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=FOLDER)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(data.stand_in, "__defaults__", (20, 10, 0))
    (tmp_path / "project").mkdir()
    monkeypatch.setattr(data, "ROOT", tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    return tmp_path


@pytest.mark.parametrize("named", ["{home}/root", "~/root", "../root", "{home}/root/{place}"])
@pytest.mark.parametrize(
    "place", [FOLDER, f"{FOLDER}/{FOLDER}", f"x/{FOLDER}", "", ARCHIVE, f"{FOLDER}/{ARCHIVE}"]
)
def test_files_one_step_off_are_used_where_they_are(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str, named: str
) -> None:
    target = home / "root" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    source = home / "source" / (ARCHIVE if ARCHIVE in place else FOLDER)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    (home / "root").chmod(0o555)  # and nothing is written
    before = sorted(home.rglob("*"))
    monkeypatch.setenv("CIFAR10_ROOT", named.format(home=home, place=place))
    images = data.load_data()
    assert images.name == "cifar10" and len(images.train) == 10 and len(images.test) == 2
    first = pickle.loads((home / "source" / FOLDER / "data_batch_1").read_bytes())
    assert np.array_equal(images.train.images[1].flatten(), first["data"][1])
    assert images.train.labels[:2].tolist() == first["labels"]
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", ARCHIVE])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"?" + b[1:], lambda b: b""])
def test_a_damaged_file_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: object
) -> None:
    monkeypatch.setenv("CIFAR10_ROOT", str(home / "source"))
    file = next((home / "source").rglob(name))
    whole, other = file.read_bytes(), ARCHIVE if name != ARCHIVE else FOLDER
    file.write_bytes(damage(whole))
    assert data.load_data().name == "cifar10"  # from the archive, or the folder, beside it
    (home / "source" / other).rename(home / "elsewhere")
    with pytest.raises(ProjectError, match=f"{name} .* its checksum; put {FOLDER}/ or {ARCHIVE}"):
        data.load_data()


@pytest.mark.parametrize("kind", ["absent", "empty", "other files", "a file", "~nobody-here"])
def test_a_root_that_was_set_and_cannot_serve_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    root = home / kind
    if kind == "a file":
        root.write_bytes(b"something else")
    elif kind != "absent":
        root.mkdir()
    if kind == "other files":
        (root / "thesis.tex").touch()
        monkeypatch.setattr(data, "_download", lambda *_: pytest.fail("into a wrong place"))
    monkeypatch.setenv("CIFAR10_ROOT", kind if kind[0] == "~" else str(root))
    with pytest.raises(ProjectError, match=rf"CIFAR10_ROOT = \S*{kind} does not .* put {FOLDER}/"):
        data.load_data()


def test_without_a_network_a_stand_in(home: Path, capsys: pytest.CaptureFixture) -> None:
    images = data.load_data()
    assert images.name == "stand-in"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "STAND-IN DATA" in said and "no network (" in said
    assert f"{FOLDER}/ or {ARCHIVE} there" in said and str(home) not in said


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A server of the archive: what is wrong with its next answers, and how often it was asked."""
    content, over = (home / "source" / ARCHIVE).read_bytes(), threading.Event()
    state = SimpleNamespace(faults=[], asked=0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fault = state.faults.pop(0) if state.faults else ""
            state.asked += 1
            body = b"<html>Log in" if fault == "login page" else content
            if fault == "late":
                over.wait(0.6)
            self.send_response(STATUS.get(fault, 200))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if fault in ("stall", "cut") else body)
            if fault == "stall":
                over.wait(0.9)

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setattr(data, "PATIENCE", 0.4)
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=[0.02], daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{listening.server_port}/")
        yield state
        over.set()
        listening.shutdown()


@pytest.mark.parametrize("faults", ["", "late", "stall", "cut busy cut late"])
def test_a_slow_network_is_tried_again(
    home: Path, server: SimpleNamespace, capsys: pytest.CaptureFixture, faults: str
) -> None:
    server.faults += faults.split()
    with ThreadPoolExecutor(2) as two:  # of which one downloads
        names = [image.name for image in two.map(lambda _: data.load_data(), range(2))]
    assert names == ["cifar10"] * 2 and server.asked == len(faults.split()) + 1
    said = capsys.readouterr()
    assert "Downloading CIFAR-10 (170 MB) into data/" in said.out
    assert not said.err
    assert [p.name for p in (home / "project" / "data").iterdir() if p.name[0] != "."] == [ARCHIVE]


def test_a_connection_that_times_out_is_tried_again(
    home: Path, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, timeout: float) -> object:
        monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)  # the next time it is there
        raise urllib.error.URLError(TimeoutError("timed out"))

    monkeypatch.setattr(urllib.request, "urlopen", slow)
    assert data.load_data().name == "cifar10" and server.asked == 1


@pytest.mark.parametrize("fault", ["busy", "cut", "login page"])
def test_a_download_that_fails_is_an_error_and_leaves_nothing(
    home: Path, server: SimpleNamespace, fault: str
) -> None:
    server.faults += [fault] * 5
    with pytest.raises(ProjectError, match="data/ does not hold CIFAR-10: "):
        data.load_data()
    assert not [p for p in (home / "project" / "data").iterdir() if p.name[0] != "."]
    assert data.load_data().name == "cifar10" and server.asked == 6


def test_cifar10_is_what_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(data.stand_in, "__defaults__", (20, 10, 0))
    images = data.load_data()
    if images.name != "cifar10":
        pytest.skip("CIFAR-10 is not on this machine")
    assert [len(part) for part in (images.train, images.test)] == [50_000, 10_000]
    levels = torch.arange(256) / 255
    for channel, mean, std in zip(images.train.images.unbind(1), data.MEAN, data.STD):
        share = channel.flatten().bincount(minlength=256) / channel.numel()
        assert (share @ levels).item() == pytest.approx(mean, abs=6e-5)
        assert (share @ (levels - mean).square()).sqrt().item() == pytest.approx(std, abs=6e-5)
    _, held_out = data.split(images.train.labels)
    assert hashlib.md5(held_out.numpy().tobytes()).hexdigest() == "1f39b3f3ca6f555ade44a3c373e4ea4d"


def test_the_stand_in_is_balanced_repeatable_and_for_convolutions(small: ImageData) -> None:
    again = data.stand_in(training=2000, test=500)
    assert torch.equal(small.train.images, again.train.images)
    assert torch.equal(small.test.labels, again.test.labels)
    assert small.train.labels.bincount().tolist() == [200] * 10
    torch.manual_seed(0)
    linear, convolutions = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), nn.Sequential()
    for n, m in ((3, 12), (12, 24), (24, 48)):
        convolutions.extend([nn.Conv2d(n, m, 5, 2, 2), nn.BatchNorm2d(m), nn.ReLU()])
    convolutions.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)])
    accuracy = []
    for network, rate in ((linear, 1e-3), (convolutions, 1e-2)):
        optimiser = torch.optim.Adam(network.parameters(), rate)
        for x, labels, _ in 4 * list(data.evaluation_loader(small.train, 100)):
            optimiser.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimiser.step()
        right = network.eval()(data.normalise(small.test.images)).argmax(1) == small.test.labels
        accuracy.append(right.float().mean().item())
    assert accuracy[0] < 0.4 and accuracy[1] > 0.7, accuracy


def test_the_split_is_stratified_and_depends_on_its_seed_only() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 53, 7, 40]))
    kept, held_out = data.split(labels, validation=30, seed=4)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(200))
    assert ((labels[held_out].bincount() - labels.bincount() * 30 / 200).abs() < 1).all()
    torch.manual_seed(9)
    assert torch.equal(data.split(labels, 30, seed=4)[1], held_out)
    assert not torch.equal(data.split(labels, 30, seed=5)[1], held_out)
    with pytest.raises(ProjectError, match="validation = 200: hold out 1 to 199"):
        data.split(labels, 200)


def test_images_are_resized_to_the_mean_of_what_a_pixel_covers() -> None:
    x = torch.randn(2, 3, 32, 32, generator=seeded())
    covered = x.view(2, 3, 16, 2, 16, 2).mean(dim=(3, 5))
    torch.testing.assert_close(data.resize(x, 16), covered)
    assert data.resize(x, 24).shape == (2, 3, 24, 24) and data.resize(x, 32) is x


def test_the_training_loader_gives_every_image_once_in_even_batches(small: ImageData) -> None:
    def record(images: Tensor, index: Tensor, epoch: int) -> Tensor:
        assert torch.equal(images, small.train.images[index]) and epoch == 3
        return images

    numbers, generator = torch.arange(5, 1006), seeded()
    loader = data.training_loader(small.train, 300, record, generator, 3, numbers)
    batches = list(loader)
    assert [len(y) for _, y, _ in batches] == [251, 250, 250, 250] and len(loader) == 4
    few = data.training_loader(small.train, 2, record, generator, 3, numbers[:3])
    assert [len(y) for _, y, _ in few] == [3]  # none of one image
    x, y, index = map(torch.cat, zip(*batches))
    assert torch.equal(index.sort().values, numbers) and not torch.equal(index, numbers)
    assert torch.equal(x, data.normalise(small.train.images[index]))
    assert torch.equal(y, small.train.labels[index])
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(torch.cat([index for *_, index in loader]), index)  # drawn anew
    x, y, index = map(torch.cat, zip(*data.evaluation_loader(small.test, 300)))
    expected = small.test.images / 255 - torch.tensor(data.MEAN).view(3, 1, 1)
    torch.testing.assert_close(x, expected / torch.tensor(data.STD).view(3, 1, 1))
    assert torch.equal(y, small.test.labels) and torch.equal(index, torch.arange(500))


def test_loaders_draw_from_their_generator_alone(small: ImageData) -> None:
    def two_epochs(seed: int) -> Tensor:
        generator, batches = seeded(seed), []
        augment = Augmentation(500, generator, Settings(cutout=8))
        for epoch in range(2):
            for x, *_ in data.training_loader(small.test, 100, augment, generator, epoch):
                batches.append(x)
                list(data.evaluation_loader(small.test.first(50)))
        return torch.cat(batches)

    before, first = torch.get_rng_state(), two_epochs(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(two_epochs(0), first) and not torch.equal(two_epochs(1), first)


@pytest.mark.parametrize("size", [4, 16])
def test_nearest_images_are_those_of_brute_force(size: int) -> None:
    coarse = torch.rand(1000, 3, 3, 3, generator=seeded())
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.rand(1000, 3, size, size, generator=seeded(1))
    share = torch.rand(1000, 1, 1, 1, generator=seeded(2)).square()  # of noise
    test, train = (255 * (smooth + share * (noise - smooth))).byte().split([100, 900])
    test[7], test[70], test[8], test[9] = train[33], 90, train[9] ^ 1, train[10] // 2
    index, distance = data.nearest_training_images(test, train)
    x, y = test.flatten(1).double(), train.flatten(1).double()
    expected = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    assert torch.equal(index, expected.argmin(1))
    torch.testing.assert_close(distance, expected.amin(1).float())
