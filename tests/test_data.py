"""Files, stand-in, splits, loaders and neighbours."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import CIFAR10

from helpers import data
from helpers.augment import Augmentation
from helpers.data import DataError, ImageData, ImageSet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small() -> ImageData:
    return data.stand_in(training=4000, test=1000)


@pytest.fixture(scope="module")
def cifar10() -> ImageData:
    if data.missing_files(data.cifar10_folder()):
        pytest.skip("CIFAR-10 is not on this machine")
    return data.read_cifar10(data.cifar10_folder())


# ---- files: CIFAR-10 in miniature, with checksums of its own


@pytest.fixture
def miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Verified files of two images each, their archive, and an empty CIFAR10_ROOT."""
    source = tmp_path / "source" / "cifar-10-batches-py"
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        (source / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((source / name).read_bytes()).hexdigest()]

    def batch() -> dict:
        return {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 8]}

    train = [write(f"data_batch_{k}", batch()) for k in range(1, 6)]
    test = [write("test_batch", batch())]
    name, checksum = write("batches.meta", {"label_names": list(data.CLASSES)})
    meta = {"filename": name, "key": "label_names", "md5": checksum}
    archive = tmp_path / "source" / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=CIFAR10.base_folder)
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    for attribute, value in [
        ("train_list", train), ("test_list", test), ("meta", meta), ("tgz_md5", checksum),
    ]:  # fmt: skip
        monkeypatch.setattr(CIFAR10, attribute, value)
    monkeypatch.setattr(data.stand_in, "__defaults__", (200, 100, 0))  # drawn at once
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    return SimpleNamespace(source=source, archive=archive, root=root, names=os.listdir(source))


@pytest.fixture
def server(miniature: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The archive at an address that can be reached."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = functools.partial(Handler, directory=str(miniature.archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{listening.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield
        listening.shutdown()


def no_network(*_: object, **__: object) -> None:
    raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))


def hanging(*_: object, **__: object) -> None:
    time.sleep(60)


def install(miniature: SimpleNamespace) -> Path:
    target = miniature.root / CIFAR10.base_folder
    target.mkdir()
    for name in miniature.names:
        (target / name).write_bytes((miniature.source / name).read_bytes())
    return target


def test_verified_files_are_read(
    miniature: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    target = install(miniature)
    images = data.load_data()
    assert images.name == "cifar10" and images.classes == data.CLASSES
    assert images.train.images.shape == (10, 3, 32, 32) and len(images.test) == 2
    first = pickle.loads((target / "data_batch_1").read_bytes())
    assert np.array_equal(images.train.images[1].flatten(), first["data"][1])
    assert images.train.labels[:2].tolist() == first["labels"]
    assert capsys.readouterr() == ("", "")


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize(
    "damage",
    [flipped, lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b + b"?"],
)
def test_a_file_that_fails_its_checksum_is_named_and_never_used(
    miniature: SimpleNamespace, server: None, name: str, damage: Callable[[bytes], bytes]
) -> None:
    file = install(miniature) / name
    wrong = damage(file.read_bytes())
    file.write_bytes(wrong)
    with pytest.raises(DataError) as raised:
        data.load_data()
    message = str(raised.value)
    assert message.startswith(f"$CIFAR10_ROOT/cifar-10-batches-py/{name} fails its checksum")
    assert "delete it" in message and str(miniature.root) not in message
    assert file.read_bytes() == wrong


def test_a_damaged_file_is_named_even_where_others_are_missing(miniature: SimpleNamespace) -> None:
    target = install(miniature)
    (target / "data_batch_1").unlink()
    (target / "test_batch").write_bytes(b"")
    with pytest.raises(DataError, match="test_batch fails its checksum"):
        data.load_data()


def test_absent_files_are_downloaded(
    miniature: SimpleNamespace, server: None, capsys: pytest.CaptureFixture
) -> None:
    timeout = socket.getdefaulttimeout()
    assert data.load_data().name == "cifar10"
    out, err = capsys.readouterr()
    assert out == "Downloading CIFAR-10 (170 MB) into $CIFAR10_ROOT …\n" and err == ""
    assert os.listdir(miniature.root) == [CIFAR10.base_folder]  # no archive, no leftovers
    assert sorted(os.listdir(miniature.root / CIFAR10.base_folder)) == sorted(miniature.names)
    assert socket.getdefaulttimeout() == timeout


FETCH = """
import json, os, sys
from torchvision.datasets import CIFAR10
for name, value in json.loads(sys.argv[1]).items():
    setattr(CIFAR10, name, value)
from helpers import data
print(len(data.load_data().train), "images", flush=True)
"""


def test_of_two_processes_one_downloads_and_the_other_waits(
    miniature: SimpleNamespace, server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, waiting = http.server.SimpleHTTPRequestHandler.copyfile, threading.Event()

    def slowly(handler: http.server.SimpleHTTPRequestHandler, source: IO, target: IO) -> None:
        target.write(source.read(1))  # enough for those who only ask whether there is an answer
        target.flush()
        waiting.wait(60)
        with contextlib.suppress(OSError):
            copy(handler, source, target)

    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", slowly)
    names = ("train_list", "test_list", "meta", "tgz_md5", "url")
    patched = json.dumps({name: getattr(CIFAR10, name) for name in names})
    command = [sys.executable, "-u", "-c", FETCH, patched]
    processes = [
        subprocess.Popen(command, cwd=data.ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lines: list[str] = []

    def listen(process: subprocess.Popen) -> None:
        for line in process.stdout:
            lines.append(line.strip())
            if "Another process" in line:
                waiting.set()

    listeners = [threading.Thread(target=listen, args=[process]) for process in processes]
    for listener in listeners:
        listener.start()
    for process, listener in zip(processes, listeners, strict=True):
        assert process.wait(90) == 0
        listener.join()
    assert sorted(lines) == [
        "10 images",
        "10 images",
        "Another process is putting CIFAR-10 into $CIFAR10_ROOT; waiting.",
        "Downloading CIFAR-10 (170 MB) into $CIFAR10_ROOT …",
    ]
    assert os.listdir(miniature.root) == [CIFAR10.base_folder]


def test_what_a_killed_download_has_left_is_removed(
    miniature: SimpleNamespace, server: None
) -> None:
    (miniature.root / ".download").mkdir()
    (miniature.root / ".download" / CIFAR10.filename).write_bytes(b"half")
    assert data.load_data().name == "cifar10"
    assert os.listdir(miniature.root) == [CIFAR10.base_folder]


def test_a_download_that_breaks_off_is_told_and_the_next_one_works(
    miniature: SimpleNamespace,
    server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        handler = http.server.SimpleHTTPRequestHandler
        patch.setattr(handler, "copyfile", lambda _, source, target: target.write(source.read(99)))
        assert data.load_data().name == "stand-in"
    said = capsys.readouterr().out
    assert "CIFAR-10 is not in $CIFAR10_ROOT" in said and "run this again" in said
    assert os.listdir(miniature.root / CIFAR10.base_folder) == []
    assert data.load_data().name == "cifar10"


def test_an_archive_put_there_by_hand_is_used_without_a_network(
    miniature: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    archive = miniature.root / CIFAR10.filename
    archive.write_bytes(miniature.archive.read_bytes())
    assert data.load_data().name == "cifar10"
    assert archive.exists()


def test_a_damaged_archive_is_named(miniature: SimpleNamespace) -> None:
    (miniature.root / CIFAR10.filename).write_bytes(b"half a download")
    with pytest.raises(DataError, match=rf"\$CIFAR10_ROOT/{CIFAR10.filename} fails its checksum"):
        data.load_data()


def test_a_download_that_is_not_the_archive_is_not_used(
    miniature: SimpleNamespace, server: None, capsys: pytest.CaptureFixture
) -> None:
    miniature.archive.write_bytes(b"<html>Please log in to this network</html>")
    assert data.load_data().name == "stand-in"
    assert "File not found or corrupted" in capsys.readouterr().out
    assert os.listdir(miniature.root / CIFAR10.base_folder) == []


@pytest.mark.parametrize(
    ("opener", "reason"),
    [(no_network, "Name or service not known"), (hanging, "no answer within 1 s")],
)
def test_without_a_network_one_sentence_says_so_soon(
    miniature: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    opener: Callable,
    reason: str,
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", opener)
    assert data.SECONDS_TO_CONNECT == 10
    monkeypatch.setattr(data, "SECONDS_TO_CONNECT", 1)
    begin = time.perf_counter()
    with pytest.raises(OSError, match=reason):
        data.check_connection(1)
    assert time.perf_counter() - begin < 5
    images = data.load_data()
    assert images.name == "stand-in"
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and out.count(". ") == 0
    assert "cannot be downloaded" in out and reason in out
    assert f"put {CIFAR10.filename}" in out and "into $CIFAR10_ROOT" in out
    assert str(miniature.root) not in out
    assert list(miniature.root.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(
    miniature: SimpleNamespace,
    server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (miniature.root / "file").write_text("")
    monkeypatch.setenv("CIFAR10_ROOT", str(miniature.root / "file"))
    assert data.load_data().name == "stand-in"
    assert "cannot be downloaded (Not a directory)" in capsys.readouterr().out


def test_a_relative_root_counts_from_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_ROOT", "elsewhere")
    assert data.cifar10_folder() == data.ROOT / "elsewhere"
    assert data.shown(data.cifar10_folder() / "x") == "elsewhere/x"
    monkeypatch.delenv("CIFAR10_ROOT")
    assert data.shown(data.cifar10_folder()) == "data"


def test_notices(small: ImageData) -> None:
    warning = data.notice(small)
    assert "STAND-IN DATA, NOT CIFAR-10" in repr(warning)
    assert "STAND-IN DATA, NOT CIFAR-10" in warning._repr_html_()
    line = data.notice(ImageData("cifar10", small.train, small.test))
    assert repr(line) == (
        "Data: CIFAR-10, 4,000 training and 1,000 test images, checksums verified."
    )
    assert line._repr_html_() is None


# ---- CIFAR-10 itself


def test_cifar10_is_what_it_should_be(cifar10: ImageData) -> None:
    for part, count in ((cifar10.train, 5000), (cifar10.test, 1000)):
        assert part.images.shape == (10 * count, 3, 32, 32) and part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.bincount().tolist() == [count] * 10


def test_mean_and_std_are_those_of_the_training_images(cifar10: ImageData) -> None:
    levels = torch.arange(256) / 255
    for channel, mean, std in zip(cifar10.train.images.unbind(1), data.MEAN, data.STD):
        share = channel.flatten().bincount(minlength=256) / channel.numel()
        assert (share @ levels).item() == pytest.approx(mean, abs=6e-5)
        assert (share @ (levels - mean).square()).sqrt().item() == pytest.approx(std, abs=6e-5)


def distinct(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_no_test_image_is_a_training_image(cifar10: ImageData) -> None:
    assert not distinct(cifar10.train.images) & distinct(cifar10.test.images)


# ---- stand-in


def test_stand_in_has_cifar10s_types_and_balance(small: ImageData) -> None:
    assert small.name == "stand-in" and len(small.classes) == 10
    for part, count in ((small.train, 400), (small.test, 100)):
        assert part.images.shape == (10 * count, 3, 32, 32) and part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        assert part.labels.bincount().tolist() == [count] * 10
    assert not distinct(small.train.images) & distinct(small.test.images)


def test_stand_in_is_the_same_for_the_same_seed() -> None:
    torch.manual_seed(1)
    first = data.stand_in(300, 100, seed=2)
    torch.manual_seed(2)
    second = data.stand_in(300, 100, seed=2)
    other = data.stand_in(300, 100, seed=3)
    for part in ("train", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)
    assert not torch.equal(first.train.images, other.train.images)


def fitted(network: nn.Module, training: ImageSet, rate: float) -> nn.Module:
    optimiser = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=7 * 40)
    generator, x = seeded(), data.normalise(training.images)
    for _ in range(7):
        for batch in torch.randperm(len(training), generator=generator).split(100):
            optimiser.zero_grad()
            F.cross_entropy(network(x[batch]), training.labels[batch]).backward()
            optimiser.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def share_right(network: nn.Module, test: ImageSet) -> float:
    return (network(data.normalise(test.images)).argmax(1) == test.labels).sum().item() / len(test)


def test_stand_in_needs_convolutions_and_yields_to_them(small: ImageData) -> None:
    def layer(channels: int, filters: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, filters, 5, stride=2, padding=2, bias=False)
        return [convolution, nn.BatchNorm2d(filters), nn.ReLU()]

    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    convolutions = nn.Sequential(
        *layer(3, 12), *layer(12, 24), *layer(24, 48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    assert 0.1 < share_right(fitted(linear, small.train, 1e-3), small.test) < 0.35
    assert share_right(fitted(convolutions, small.train, 1e-2), small.test) > 0.7


# ---- splits


def test_split_is_disjoint_complete_and_exactly_stratified() -> None:
    labels = torch.arange(50_000) % 10
    training, validation = data.split(labels)
    assert len(training) == 45_000 and len(validation) == 5_000
    assert torch.equal(torch.cat([training, validation]).sort().values, torch.arange(50_000))
    assert labels[training].bincount().tolist() == [4500] * 10
    assert labels[validation].bincount().tolist() == [500] * 10


def test_split_of_unequal_classes_is_fair_to_one_image() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([100, 53, 7, 40]))
    _, validation = data.split(labels, validation=30)
    expected = labels.bincount() * 30 / 200
    assert len(validation) == 30
    assert ((labels[validation].bincount(minlength=4) - expected).abs() < 1).all()


def test_split_depends_on_its_seed_only() -> None:
    labels = torch.arange(1000) % 10
    first = data.split(labels, 100, seed=4)
    torch.manual_seed(9)
    assert all(torch.equal(a, b) for a, b in zip(first, data.split(labels, 100, seed=4)))
    assert not torch.equal(first[1], data.split(labels, 100, seed=5)[1])


@pytest.mark.parametrize("validation", [0, 1000, -5])
def test_a_split_with_an_empty_part_is_refused(validation: int) -> None:
    with pytest.raises(ValueError, match=r"validation=.* is not allowed; use 1 to 999"):
        data.split(torch.zeros(1000, dtype=torch.int64), validation)


# ---- loaders


def loader_of(
    images: ImageSet, seed: int = 0, batch_size: int = 300
) -> torch.utils.data.DataLoader:
    generator = seeded(seed)
    augmentation = Augmentation(len(images), 2, True, generator)
    return data.training_loader(images, batch_size, augmentation, generator)


def epochs_of(
    loader: torch.utils.data.DataLoader, between: Callable = lambda: None
) -> list[Tensor]:
    """The batches of two epochs, with something else going on between all of them."""
    batches = []
    for epoch in range(2):
        data.set_epoch(loader, epoch)
        for x, *_ in loader:
            batches.append(x)
            between()
    return batches


def plain(images: Tensor, index: Tensor, epoch: int) -> Tensor:
    return images


def test_training_loader_gives_every_image_once_with_its_label(small: ImageData) -> None:
    numbered = ImageSet(small.train.images[:1000], torch.arange(1000))
    loader = data.training_loader(numbered, 300, plain, seeded())
    batches = list(loader)
    assert [len(y) for _, y, _ in batches] == [250] * 4  # and not 300, 300, 300, 100
    order = torch.cat([y for _, y, _ in batches])
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, torch.arange(1000))
    x = torch.cat([x for x, *_ in batches])
    assert torch.equal(x, data.normalise(numbered.images[order]))
    assert x.dtype == torch.float32 and order.dtype == torch.int64
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    again = torch.cat([y for _, y, _ in loader])
    assert not torch.equal(again, order)  # another epoch, another order


def test_training_loader_gives_only_the_images_of_the_epoch_and_their_numbers(
    small: ImageData,
) -> None:
    loader = data.training_loader(small.train, 8, plain, seeded())
    data.set_epoch(loader, 0, torch.tensor([3, 50, 7, 700, 20, 21, 22, 23, 24]))
    batches = list(loader)
    assert [len(numbers) for *_, numbers in batches] == [5, 4]
    numbers = torch.cat([numbers for *_, numbers in batches])
    assert sorted(numbers.tolist()) == [3, 7, 20, 21, 22, 23, 24, 50, 700]
    x = torch.cat([x for x, *_ in batches])
    assert torch.equal(x, data.normalise(small.train.images[numbers]))
    assert torch.equal(torch.cat([y for _, y, _ in batches]), small.train.labels[numbers])
    data.set_epoch(loader, 1)  # all again
    assert sum(len(y) for _, y, _ in loader) == len(small.train)


def test_augmentation_gets_the_images_their_numbers_and_the_epoch(small: ImageData) -> None:
    seen = []

    def record(images: Tensor, index: Tensor, epoch: int) -> Tensor:
        seen.append((images, index, epoch))
        return images

    loader = data.training_loader(small.train.subset(torch.arange(70)), 40, record, seeded())
    for epoch in (0, 1):
        data.set_epoch(loader, epoch)
        list(loader)
    assert [epoch for _, _, epoch in seen] == [0, 0, 1, 1]
    for images, index, _ in seen:
        assert torch.equal(images, small.train.images[index])


def test_loading_leaves_the_images_alone(small: ImageData) -> None:
    before = small.train.images.clone()
    epochs_of(loader_of(small.train))
    assert torch.equal(small.train.images, before)


def test_evaluation_loader_is_clean_in_order_and_ragged(small: ImageData) -> None:
    batches = list(data.evaluation_loader(small.test, 300))
    assert [len(y) for _, y, _ in batches] == [300, 300, 300, 100]
    assert torch.equal(torch.cat([y for _, y, _ in batches]), small.test.labels)
    assert torch.equal(torch.cat([x for x, *_ in batches]), data.normalise(small.test.images))


def test_normalise_is_the_formula(small: ImageData) -> None:
    images = small.test.images[:50]
    mean = np.array(data.MEAN)[:, None, None]
    std = np.array(data.STD)[:, None, None]
    expected = (images.numpy() / 255 - mean) / std
    assert np.abs(data.normalise(images).numpy() - expected).max() < 1e-5


def test_nothing_but_the_generator_changes_the_training_batches(small: ImageData) -> None:
    images = small.train.subset(torch.arange(1000))
    undisturbed = epochs_of(loader_of(images))

    def disturb() -> None:
        torch.rand(3)
        for _ in data.evaluation_loader(small.test.subset(torch.arange(50))):
            pass

    torch.manual_seed(123)
    disturbed = epochs_of(loader_of(images), disturb)
    assert all(torch.equal(a, b) for a, b in zip(undisturbed, disturbed, strict=True))
    assert not torch.equal(undisturbed[0], epochs_of(loader_of(images, seed=1))[0])


def test_loaders_leave_the_global_generator_alone(small: ImageData) -> None:
    before = torch.get_rng_state()
    epochs_of(loader_of(small.train))
    list(data.evaluation_loader(small.test))
    assert torch.equal(torch.get_rng_state(), before)


# ---- neighbours


def smooth(count: int, seed: int) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=seeded(seed)) * 255
    return F.interpolate(coarse, size=(8, 8), mode="bilinear").to(torch.uint8)


def by_brute_force(test: Tensor, train: Tensor) -> Tensor:
    difference = test.numpy()[:, None].astype(float) - train.numpy()[None]
    return torch.from_numpy(np.sqrt((difference**2).mean(axis=(2, 3, 4))))


def test_neighbours_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SHORTLIST", 60)
    test, train = smooth(80, 0), smooth(300, 1)
    test[7], test[70] = train[33], train[299]  # equal
    train[5] = test[9] ^ 1  # nearly equal
    index, distance, certain = data.nearest_training_images(test, train, 3)
    all_distances = by_brute_force(test, train)
    nearest = all_distances.topk(3, largest=False)
    assert index.shape == distance.shape == (80, 3) and certain.shape == (80,)
    assert certain.float().mean() > 0.8  # or the next two lines say little
    assert torch.equal(index[certain], nearest.indices[certain])
    assert (distance - nearest.values)[certain].abs().max() < 1e-3
    assert (distance - all_distances.gather(1, index)).abs().max() < 1e-3
    assert index[[7, 70, 9], 0].tolist() == [33, 299, 5]
    assert distance[[7, 70, 9], 0].tolist() == pytest.approx([0, 0, 1], abs=1e-3)


def test_neighbours_that_may_have_been_missed_are_not_called_certain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "SHORTLIST", 2)
    noise = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8, generator=seeded())
    index, _, certain = data.nearest_training_images(noise[:100], noise[100:], 1)
    wrong = index[:, 0] != by_brute_force(noise[:100], noise[100:]).argmin(dim=1)
    assert wrong.any()
    assert not (wrong & certain).any()


def test_neighbours_among_few_images_are_certain() -> None:
    index, _, certain = data.nearest_training_images(smooth(5, 0), smooth(9, 1), 9)
    assert certain.all()
    assert torch.equal(index.sort(dim=1).values, torch.arange(9).expand(5, 9))
    with pytest.raises(ValueError, match="count=10 is not allowed; use 1 to 9"):
        data.nearest_training_images(smooth(5, 0), smooth(9, 1), 10)
