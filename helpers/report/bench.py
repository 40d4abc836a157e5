"""What blocks and training steps cost on this machine, in under ten minutes: `make bench`.

It writes one table, `notebooks/benchmarks/<machine>.csv`. Cases with the same `what` take turns, so
that a machine that slows down for a while slows all of them; `milliseconds` is the median of `n`
rounds, `ratio` is to the first case of that `what`.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from helpers.model import IntermediateBlock
from helpers.optimizers import make_optimizers
from helpers.project import BENCHMARKS, command, shown, write_file
from helpers.record import surroundings
from helpers.settings import Settings, pick_device, pick_precision
from helpers.study import branches
from helpers.training import train_step

ROUNDS = 11
EPOCH = "step of six 3×3 convolutions, 64 64 256 ×4"  # 100 of them are the reference epoch
SHAPES = ((64, 32), (128, 16), (256, 8), (256, 4))  # of single blocks: channels; height and width
Case = tuple[str, str, int, Callable[[], object]]  # what, implementation, L, and how to run it


def step(
    what: str, kind: str, precision: torch.dtype, device: torch.device, **parameters: Any
) -> Case:
    """A training step on random images at full resolution: forward, backward, optimisers."""
    settings = Settings(**parameters)
    network = settings.network().to(device, memory_format=torch.channels_last).train()
    for layer in network.blocks:
        layer.implementation = kind
    b, optimizers = settings.batch_size, make_optimizers(network, settings, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    x = torch.randn(b, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    batch = x, torch.randint(10, (b,), device=device), torch.ones(b, device=device)
    run = partial(train_step, network, optimizers, scaler, precision, 0.1, *batch)
    return f"{what}, batch {b}", kind, len(settings.blocks[0].kernels), run


def block(c: int, size: int, kind: str, precision: torch.dtype, device: torch.device) -> Case:
    """Forward and backward of a block with four 3×3 branches, or of one plain convolution."""
    plain = kind == "plain convolution"
    layer: nn.Module = nn.Conv2d(c, c, 3, padding=1, bias=False)
    if not plain:
        layer = IntermediateBlock(c, c, [3] * 4, bias=False, implementation=kind)
    layer = layer.to(device, memory_format=torch.channels_last)
    x = torch.randn(128, c, size, size, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()

    def run() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            y = layer(x)
        y.backward(torch.ones_like(y))

    return f"block, {c} channels, {size}×{size}, batch 128", kind, 1 if plain else 4, run


def comparisons(where: tuple[torch.dtype, torch.device]) -> Iterator[list[Case]]:
    """What is compared in a precision on a device."""
    kinds = "reference", "auto"
    yield [step(EPOCH, "reference", *where, **branches(3, wider=2), batch_size=500)]
    yield [step("step of the preset small", kind, *where) for kind in kinds]
    cases = [(kind, L) for kind in kinds for L in (1, 2, 4, 8)]
    what = "step with L branches of 3×3"
    yield [step(what, kind, *where, **branches(*[3] * L)) for kind, L in cases]
    for shape in SHAPES:
        yield [block(*shape, kind, *where) for kind in ("plain convolution", *kinds)]


def measure(cases: list[Case]) -> pd.DataFrame:
    """A row a case; the first round, in which the memory is found, does not count."""
    spent = pd.DataFrame(0.0, index=range(ROUNDS + 1), columns=range(len(cases)))
    for turn in spent.index:
        for k, (*_, run) in enumerate(cases):
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent.loc[turn, k] = 1000 * (time.perf_counter() - begin)
    rows = pd.DataFrame([case[:3] for case in cases], columns=["what", "implementation", "L"])
    median = spent.iloc[1:].median()
    return rows.assign(milliseconds=median, n=ROUNDS, ratio=median / median[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m helpers.report.bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    with command("the table is as it was"):
        device, tables = pick_device(options.device), []
        best = pick_precision("auto", device)
        known = surroundings(device, best)["hardware"]
        machine = known.get("gpu") or f"{known['processor']}, {known['threads']} threads"
        for precision in dict.fromkeys([torch.float32, best]):
            for cases in comparisons((precision, device)):
                name = str(precision).removeprefix("torch.")
                table = measure(cases)
                table.insert(0, "precision", name)
                print(f"\n{table.to_string(index=False, float_format='%.4g')}", flush=True)
                if table["what"][0].startswith(EPOCH):
                    seconds = table["milliseconds"][0] / 10
                    print(f"So the reference epoch of 50,000 images takes {seconds:.0f} s.")
                tables.append(table)
        path = BENCHMARKS / f"{re.sub(r'[^a-z0-9]+', '-', machine.lower()).strip('-')}.csv"
        path.parent.mkdir(exist_ok=True)
        table = pd.concat(tables)
        table.insert(0, "machine", machine)
        write_file(path, table.to_csv(index=False, float_format="%.4g"))
        print(f"{shown(path)} is written.")


if __name__ == "__main__":
    main()
