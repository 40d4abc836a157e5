"""A run that is killed a hundred times gives the bits of one that was not: `make soak`.

    python tests/soak.py        # a hundred kills: about half an hour
    python tests/soak.py 5      # fewer

The small network learns from a part of the stand-in, in a process of its own, with a checkpoint
after every batch. That process is killed (SIGKILL) and started again: of ten times five while a
checkpoint is being written, four at a random moment of its training, once of its start. In the end
it is left alone, and its weights, losses and history are compared with those of a run that was
never disturbed.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from helpers import data, project, training
from helpers.settings import Settings

EPOCHS = 60
SECONDS_OF_A_LIFE = 1.0  # at most, from its first checkpoint on
ONE_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests import soak
soak.train_once(Path(sys.argv[2]))
"""


def train_once(folder: Path) -> None:
    """The run, or what is left of it, in `folder`."""
    project.RUNS, training.SECONDS_BETWEEN_CHECKPOINTS = folder, 0
    settings = Settings(
        epochs=EPOCHS, first_sizes=[16] * 20, batch_size=50, device="cpu", run="soak"
    )
    training.train(data.stand_in(training=400, test=100), settings)


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", ONE_RUN, str(project.ROOT), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def written(folder: Path) -> int:
    """When the latest checkpoint was written, in nanoseconds; 0 if there is none."""
    try:
        return (folder / "soak" / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while not happened():
        if process.poll() is not None:
            raise SystemExit("The run ended before it was killed; raise EPOCHS in tests/soak.py.")
        time.sleep(0.001)


def survive(folder: Path, kills: int, chance: random.Random) -> int:
    """Kill the run so often, then let it end; how many kills found half a checkpoint."""
    half, halves = folder / "soak" / "checkpoint.pt.new", 0
    for kill in range(kills):
        process, before = start(folder), written(folder)
        if kill % 10 == 9:
            time.sleep(chance.uniform(0, 5))  # while it starts
        else:
            wait_for(process, lambda before=before: written(folder) > before)
            time.sleep(chance.uniform(0, SECONDS_OF_A_LIFE))
        if kill % 10 < 5:
            wait_for(process, half.exists)
        process.kill()
        process.wait()
        halves += half.exists()
        print(f"kill {kill + 1} of {kills}", end="\r", flush=True)
    if start(folder).wait():
        raise SystemExit("The run did not end well after the last kill.")
    return halves


def main() -> None:
    from test_training import assert_same_bits  # beside this file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as work:
        disturbed, undisturbed = Path(work) / "disturbed", Path(work) / "undisturbed"
        halves = survive(disturbed, kills, random.Random(0))
        if start(undisturbed).wait():
            raise SystemExit("The undisturbed run did not end well.")
        assert_same_bits(disturbed / "soak", undisturbed / "soak")
    print(f"{kills} kills, {halves} of them within a checkpoint: the same bits.")


if __name__ == "__main__":
    main()
