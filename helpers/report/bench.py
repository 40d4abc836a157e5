"""What training steps cost on this machine's processor, in under ten minutes: `make bench`.

It writes one table, `notebooks/benchmarks/<machine>.csv`. Cases with the same `what` take turns, so
that a machine that slows down for a while slows all of them; `milliseconds` is the median of `n`
rounds.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch

from helpers.project import BENCHMARKS, exit_with_message, short, write_file
from helpers.runs import surroundings
from helpers.settings import Settings, pick_precision, six_blocks
from helpers.study import planned, plans
from helpers.training import make_optimizers, train_step

ROUNDS = 11
REFERENCE = "reference step, six 3×3 convolutions, 64 64 256 ×4, batch 500"
NETWORKS = "step of the networks of the study, batch 250"


def cases(what: str) -> list[tuple[str, str, Settings]]:
    """Network in words, implementation and parameters of what is timed side by side."""
    if what == REFERENCE:
        blocks = six_blocks([3], [64, 256, 256])
        return [("", "reference", Settings(blocks=blocks, batch_size=500))]
    words = {name: variant["words"] for name, variant in plans()["blocks"].variants.items()}
    networks: dict[str, tuple[str, Settings]] = {}
    for name, _, own in planned("blocks"):  # those with other gates cost the same
        networks.setdefault(str(own.blocks), (words[name], own))
    kinds = "reference", "auto"  # the second is the default
    return [(words, kind, own) for kind in kinds for words, own in networks.values()]


def training_step(kind: str, settings: Settings, precision: torch.dtype) -> Callable[[], object]:
    """A step on random images at full resolution, ready to run: forward, backward, optimisers."""
    network = settings.network().to(memory_format=torch.channels_last).train()
    for layer in network.blocks:
        layer.implementation = kind
    optimizers = make_optimizers(network, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    b = settings.batch_size
    x = torch.randn(b, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = x, torch.randint(10, (b,)), torch.ones(b)
    return partial(train_step, network, optimizers, scaler, precision, 0.1, *batch)


def measure(what: str, precision: torch.dtype) -> pd.DataFrame:
    """One row per case, also printed; the first round, a warm-up, does not count."""
    words, kinds, settings = zip(*cases(what))
    steps = [training_step(kind, own, precision) for kind, own in zip(kinds, settings)]
    spent: list[list[float]] = [[] for _ in steps]
    for turn in range(1 + ROUNDS):  # alternating the order, as a step warms the caches for the next
        for step, own in [*zip(steps, spent)][:: (-1) ** turn]:
            begin = time.perf_counter()
            step()
            own.append(1000 * (time.perf_counter() - begin))
    median = [statistics.median(own[1:]) for own in spent]
    table = pd.DataFrame({
        "precision": str(precision).removeprefix("torch."), "what": what, "network": words,
        "implementation": kinds, "L": [len(own.blocks[0].kernels) for own in settings],
        "milliseconds": median, "n": ROUNDS,
    })  # fmt: skip
    print(f"\n{table.to_string(index=False, float_format='%.4g')}", flush=True)
    if what == REFERENCE:
        print(f"A reference epoch, 50,000 images: {median[0] / 10:.0f} s.")
    return table


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser("python -m helpers.report.bench", None, __doc__).parse_args(arguments)
    with exit_with_message("the table is unchanged"):
        cpu = torch.device("cpu")
        dtypes = dict.fromkeys([torch.float32, pick_precision("auto", cpu)])
        table = pd.concat([measure(what, own) for own in dtypes for what in (REFERENCE, NETWORKS)])
        made_on = surroundings(cpu, torch.float32)["hardware"]
        machine = f"{made_on['processor']}, {made_on['threads']} threads"
        table.insert(0, "machine", machine)
        path = BENCHMARKS / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower())}.csv"
        write_file(path, table.to_csv(index=False, float_format="%.4g"))
        print(f"Wrote {short(path)}.")


if __name__ == "__main__":
    main()
