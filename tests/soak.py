"""A run that is killed again and again gives the bits of one that was not: `make soak`.

    python tests/soak.py        # a hundred kills: about a quarter of an hour
    python tests/soak.py 5      # fewer

The quick network learns from a few small images in a process of its own, with a checkpoint after
every batch. That process is killed (SIGKILL) at random moments, some before it has begun, and
started again. At last it may end, and its weights, losses and history are compared with those of
an undisturbed run. The result is written to `notebooks/benchmarks/soak.json`.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from helpers import data, runs, training

EPOCHS = 100
ONE_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests import conftest, soak
soak.train_once(Path(sys.argv[2]), conftest.small_images())
"""


def train_once(folder: Path, images: data.ImageData) -> None:
    """The run, or what is left of it, in `folder`."""
    runs.RUNS, training.SECONDS_BETWEEN_CHECKPOINTS = folder, 0
    settings = runs.Settings(epochs=EPOCHS, batch_size=32, device="cpu", run="soak")
    training.train(images, settings)


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", ONE_RUN, str(data.ROOT), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def seconds_to_the_first_checkpoint(folder: Path) -> float:
    begin, process = time.perf_counter(), start(folder)
    while not (folder / "soak" / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    return time.perf_counter() - begin


def survive(folder: Path, kills: int, chance: random.Random) -> int:
    """Kill the run so often, then let it end; how many kills found it under way."""
    until_it_works, useful = seconds_to_the_first_checkpoint(folder), 0
    for kill in range(1, kills):  # the first was that of the measurement
        process, checkpoint = start(folder), folder / "soak" / "checkpoint.pt"
        before = checkpoint.stat().st_mtime_ns
        try:
            process.wait(timeout=chance.uniform(0, 1.5 * until_it_works))
            raise SystemExit(f"The run ended before kill {kill}; raise EPOCHS in tests/soak.py.")
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        useful += checkpoint.stat().st_mtime_ns != before
        print(f"kill {kill + 1} of {kills}", end="\r", flush=True)
    if start(folder).wait():
        raise SystemExit("The run did not end well after the last kill.")
    return useful + 1


def same(ours: Path, theirs: Path) -> dict[str, bool]:
    """Which parts of two runs' records are equal to the bit."""
    one, two = (torch.load(path / "weights.pt", weights_only=True) for path in (ours, theirs))
    weights = all(torch.equal(one[name], two[name]) for name in one | two)
    timed = ["seconds", "images_per_second"]
    histories = [pd.read_csv(path / "history.csv").drop(columns=timed) for path in (ours, theirs)]
    batches = [(path / "batches.csv").read_bytes() for path in (ours, theirs)]
    return {
        "weights": weights,
        "history": histories[0].equals(histories[1]),
        "batches": batches[0] == batches[1],
    }


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as work:
        disturbed, undisturbed = Path(work) / "disturbed", Path(work) / "undisturbed"
        if start(undisturbed).wait():
            raise SystemExit("The undisturbed run did not end well.")
        useful = survive(disturbed, kills, random.Random(0))
        result = {
            "kills": kills,
            "kills_that_found_it_training": useful,
            "epochs": EPOCHS,
            "equal": same(disturbed / "soak", undisturbed / "soak"),
        } | runs.surroundings(torch.device("cpu"))
    runs.write_json(runs.BENCHMARKS / "soak.json", result)
    print(f"{kills} kills; equal: {result['equal']}")
    sys.exit(not all(result["equal"].values()))


if __name__ == "__main__":
    main()
