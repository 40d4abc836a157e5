"""The explorer opens from the file system, filters and answers clicks, and asks nobody."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import data, evaluation, explorer, runs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
# What a visitor does, and what he sees of it.
VISIT = """<script>
const seen = {errors};
const buttons = () => [...document.querySelectorAll("#gallery button")];
const set = (name, value) => {
  byId(name).value = value;
  byId(name).dispatchEvent(new Event("input"));
};
seen.all = buttons().length;
set("answer", "wrong");
seen.wrong = buttons().length;
set("class", "3");
seen.wrongOfClass3 = buttons().map(button => button.title);
set("answer", "");
set("class", "");
set("low", "40");
seen.sure = buttons().map(button => Number(button.title.match(/\\(([\\d.]+)%/)[1]));
seen.count = byId("count").textContent;
set("low", "0");
buttons()[5].click();
seen.pressed = buttons().findIndex(button => button.getAttribute("aria-pressed") === "true");
seen.said = document.querySelector("#detail p").textContent;
seen.probabilities = document.querySelectorAll("#probabilities tr").length;
seen.gates = [...document.querySelectorAll("#gates tr")].map(row => row.textContent);
seen.bars = [...document.querySelectorAll("#gates .bar")]
  .map(bar => [parseFloat(bar.style.left), parseFloat(bar.style.width)]);
seen.ticks = document.querySelectorAll("#gates .mean").length;
seen.about = byId("about").textContent;
seen.requests = performance.getEntriesByType("resource").map(entry => entry.name)
  .filter(name => !name.startsWith("data:"));
document.body.dataset.seen = JSON.stringify(seen);
</script></body>"""
WATCH = "<head><script>const errors = []; window.onerror = said => errors.push(said);</script>"


@pytest.fixture(params=["softmax", "linear"])
def page(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_images: data.ImageData,
) -> tuple[Path, nn.Module]:
    """The page of an untrained network on tiny images, and that network."""
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    settings = runs.Settings(
        widths=[8, 8], branches=3, kernel_size=3, gate=request.param, pool_after=[1], run="tiny"
    )
    network = settings.network()
    for block in network.blocks:
        nn.init.normal_(block.fc.weight)
    with runs.Record(settings, tiny_images) as record:
        record.add_epoch({"epoch": 1}, [{"epoch": 1, "batch": 1, "loss": 2.0}])
        run = record.finish(network, {"dataset": "stand-in"})
    explorer.write_explorer(run, tiny_images, tmp_path / "explorer.html")
    return tmp_path / "explorer.html", network.eval()


def content_of(page: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def test_the_page_says_what_the_network_says(
    page: tuple[Path, nn.Module], tiny_images: data.ImageData
) -> None:
    content, network = content_of(page[0]), page[1]
    logits = evaluation.predict(network, tiny_images.test)
    a = evaluation.gates(network, tiny_images.test)
    assert len(content["images"]) == len({one["number"] for one in content["images"]})
    for one in content["images"]:
        i = one["number"]
        assert one["answer"] == logits[i].argmax() and one["label"] == tiny_images.test.labels[i]
        assert one["probabilities"] == pytest.approx(logits[i].softmax(0).tolist(), abs=6e-4)
        for ours, theirs in zip(one["a"], a):
            assert ours == pytest.approx(theirs[i].tolist(), abs=6e-4)
    mean = a[1][tiny_images.test.labels == 4].mean(dim=0)
    assert content["class_means"][1][4] == pytest.approx(mean.tolist(), abs=6e-4)


def test_the_picture_holds_the_images_in_their_places(
    page: tuple[Path, nn.Module], tiny_images: data.ImageData
) -> None:
    content = content_of(page[0])
    png = base64.b64decode(content["picture"].split(",")[1])
    picture = np.asarray(Image.open(io.BytesIO(png)))
    for place, one in enumerate(content["images"]):
        row, column = divmod(place, content["columns"])
        shown = picture[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        image = tiny_images.test.images[one["number"]].permute(1, 2, 0).numpy()
        assert (shown == image).all()


def test_half_of_the_images_are_mistakes() -> None:
    logits, labels = torch.zeros(1000, 10), torch.zeros(1000, dtype=torch.long)
    logits[::4, 1] = 1.0  # 250 mistakes
    numbers = explorer.chosen(logits, labels, count=100)
    assert len(numbers) == 100 and (numbers % 4 == 0).sum() == 50
    assert numbers.tolist() == sorted(set(numbers.tolist()))
    logits[8:] = 0.0  # two are left
    numbers = explorer.chosen(logits, labels, count=100).tolist()
    assert len(numbers) == 52 and {0, 4} <= set(numbers)


def test_the_page_asks_nobody(page: tuple[Path, nn.Module]) -> None:
    text = page[0].read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|@import|<link", text)
    assert text.count("<script") == 2 and "{{" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_visit(page: tuple[Path, nn.Module], tmp_path: Path) -> None:
    content = content_of(page[0])
    text = page[0].read_text(encoding="utf-8")
    visited = tmp_path / "visited.html"
    visited.write_text(text.replace("<head>", WATCH).replace("</body>", VISIT), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         visited.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(html.unescape(re.search(r'data-seen="(.*?)"', done.stdout, re.S)[1]))
    assert seen["errors"] == [] and "CONSOLE" not in done.stderr
    assert seen["requests"] == []
    images = content["images"]
    wrong = [one for one in images if one["label"] != one["answer"]]
    assert (seen["all"], seen["wrong"]) == (len(images), len(wrong))
    cats = [one for one in wrong if one["label"] == 3]
    assert len(seen["wrongOfClass3"]) == len(cats)
    assert all(title.startswith("cat, answered") for title in seen["wrongOfClass3"])
    sure = [one for one in images if max(one["probabilities"]) >= 0.4]
    assert len(seen["sure"]) == len(sure) and all(value >= 40 for value in seen["sure"])
    assert seen["count"] == f"{len(sure)} of {len(images)} images"
    assert seen["pressed"] == 5
    fifth = images[5]
    assert f"Test image {fifth['number']}: {content['classes'][fifth['label']]}" in seen["said"]
    assert seen["probabilities"] == 10
    assert len(seen["gates"]) == seen["ticks"] == 6  # two blocks of three branches
    assert seen["gates"][4] == f"B2 a2 (3×3){fifth['a'][1][1]:.3f}"
    assert "STAND-IN" in seen["about"]
    assert f"{len(wrong)} of the {len(images)} images shown were drawn" in seen["about"]
    weights = [weight for block in fifth["a"] for weight in block]
    means = [weight for block in content["class_means"] for weight in block[fifth["label"]]]
    low, high = min(0, *weights, *means), max(1, *weights, *means)
    bars = [  # from zero to the right, or to the left of it
        (100 * (min(0, weight) - low) / (high - low), 100 * abs(weight) / (high - low))
        for weight in weights
    ]
    assert seen["bars"] == [pytest.approx(bar, abs=0.01) for bar in bars]
