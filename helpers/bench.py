"""What a block and a training step cost, measured side by side: `make bench`.

    python -m helpers.bench                # everything: fifty minutes on two idle cores
    python -m helpers.bench tried memory   # some of the tables only
    python -m helpers.bench --device cuda  # on a GPU, what is measured there: three minutes

It writes into `notebooks/benchmarks/<instructions of the CPU, or GPU>/`: `blocks.csv`, `steps.csv`,
`full.csv`, `tried.csv` and `memory.csv` (a row a candidate), `compiled.csv` (a row a block about
where the compiled program begins to pay), `profile.csv` (where the time of a step goes; on a GPU
also `profile_full.csv`) and `machine.json`, which says when each table was measured. Notebooks 02
and 03 show those of the CPU whose tables are the newest, and 02 those of the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from helpers import mixing, runs, training
from helpers.model import FORMS, IntermediateBlock

BATCH = {"cpu": 128, "cuda": 512}  # a GPU has more to do at once
# in and out channels, and the size of the map: the quick network's, and wider ones.
SHAPES = (
    (24, 32, 32), (64, 64, 32), (32, 32, 16), (64, 64, 16), (64, 128, 16), (32, 128, 16),
    (128, 128, 16), (64, 256, 16), (128, 128, 8), (128, 256, 8), (256, 256, 8), (128, 128, 4),
    (256, 256, 4),
)  # fmt: skip
SWEPT = (24, 32, 32), (64, 128, 16), (128, 128, 8), (128, 128, 4)  # for which L is varied
# With branches of 3×3 and 1×1, as the presets have them; the last ones on the maps of full.
MIXED = (
    (32, 128, 16), (128, 128, 8), (96, 384, 16), (384, 384, 8), (384, 384, 6), (384, 384, 4),
    (384, 384, 2),
)  # fmt: skip
# Kernels and maps about where the compiled program begins to pay, and channels.
NEARLY_EVEN = (
    ((3, 1), 6), ((3, 3), 2), ((3, 1), 7), ((3, 1), 8), ((3, 1, 1), 6), ((3, 3), 3), ((3, 1), 10),
    ((3, 1, 1), 8), ((3, 3), 4),
)  # fmt: skip
CHANNELS = (64, 64), (32, 128), (128, 128), (384, 384)
BRANCHES = (1, 2, 4, 8)
ROUNDS = 5  # in which the candidates take turns
ROUNDS_OF_STEPS = 21  # that of L branches, where hundredths are asked for
ROUNDS_NEARLY_EVEN = 9
REPEATS = {"cpu": 1, "cuda": 10}  # runs of each in a round
LAST = "channels_last"


def one_after_another(
    candidates: dict[Any, Callable[[], object]], rounds: int = ROUNDS, repeats: int | None = None
) -> dict[Any, float]:
    """The seconds of each candidate: the median over rounds of the mean of a few runs.

    The candidates take turns, so that a machine that slows down for a while slows all of them.
    """
    repeats = repeats or REPEATS[device().type]
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
        for name, run in candidates.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats).mean)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device() -> torch.device:
    """What is measured: torch's default device."""
    return torch.get_default_device()


def maps(channels: int, size: int, memory_format: torch.memory_format) -> Tensor:
    x = torch.randn(BATCH[device().type], channels, size, size)
    return x.contiguous(memory_format=memory_format)


def there_and_back(
    layer: nn.Module, channels: int, size: int, memory_format: str, precision: torch.dtype
) -> Callable:
    """A function that runs a layer forward and backward, on the gradient of random maps; on a GPU
    as a training does it, from a recording."""
    layout = getattr(torch, memory_format)
    layer = layer.to(memory_format=layout)
    x = maps(channels, size, layout).to(precision).requires_grad_()

    def forward() -> Tensor:
        half = precision == torch.bfloat16
        with torch.autocast(device().type, dtype=torch.bfloat16, enabled=half):
            return layer(x)

    grad = torch.randn_like(forward())

    def run() -> None:
        for changed in (x, *layer.parameters()):
            changed.grad = None
        forward().backward(grad)

    return replay(run) if device().type == "cuda" else run


def replay(run: Callable[[], object]) -> Callable[[], object]:
    """What repeats the calls of `run` from a recording on the GPU."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()

    def again(_: Callable = run) -> None:  # whose tensors have to stay where they are
        graph.replay()

    return again


def plain(c: int, out: int, size: int, precision: torch.dtype) -> dict[str, Callable]:
    """One plain convolution of that shape, in either memory format."""
    return {
        f"plain, {layout}": there_and_back(
            nn.Conv2d(c, out, 3, padding=1, bias=False), c, size, layout, precision
        )
        for layout in ("contiguous_format", LAST)
    }


def block(
    c: int, out: int, size: int, kernel_sizes: Sequence[int], form: str, precision: torch.dtype
) -> Callable:
    layer = IntermediateBlock(c, out, len(kernel_sizes), kernel_sizes, bias=False, form=form)
    return there_and_back(layer, c, size, LAST, precision)


def precisions() -> list[str]:
    """The names of the number types with which this device calculates at full speed."""
    if device().type == "cuda":
        return ["bfloat16"]
    able = runs.pick_precision("auto", device()) == torch.bfloat16
    return ["float32"] + ["bfloat16"] * able


def bench_blocks() -> pd.DataFrame:
    """Forward and backward of a block over one plain convolution (the faster memory format), in
    each precision that the device is made for.

    A row for each precision, shape, kernel sizes and form; `ratio` is to the plain convolution of
    the same rounds.
    """
    able = device().type == "cpu" and not mixing.missing()
    rows, forms = [], [form for form in FORMS if form != "compiled" or able]
    cases = [(shape, (3,) * 4) for shape in SHAPES]
    cases += [(shape, (3,) * L) for shape in SWEPT for L in BRANCHES if L != 4]
    cases += [(shape, (3, 1)) for shape in MIXED]
    for numbers, ((c, out, size), sizes) in itertools.product(precisions(), cases):
        precision, kernels = getattr(torch, numbers), "+".join(map(str, sizes))
        candidates: dict[str, Callable] = plain(c, out, size, precision)
        candidates |= {form: block(c, out, size, sizes, form, precision) for form in forms}
        seconds = one_after_another(candidates)
        one = min(value for name, value in seconds.items() if name.startswith("plain"))
        for form in forms:
            rows.append(
                {"precision": numbers, "in": c, "out": out, "map": size, "L": len(sizes),
                 "kernels": kernels, "form": form, "milliseconds": 1e3 * seconds[form],
                 "plain": 1e3 * one, "ratio": seconds[form] / one}
            )  # fmt: skip
        ratios = ", ".join(f"{form} {seconds[form] / one:.2f}" for form in forms)
        print(f"{numbers}, {c}→{out} at {size}×{size}, kernels {kernels}: {ratios}", flush=True)
    return pd.DataFrame(rows)


def bench_compiled() -> pd.DataFrame:
    """Forward and backward of a block by the compiled program over what `auto` takes without it, in
    each precision that the device is made for: what `RULES` say of when it pays.

    `saved` is how many positions the convolution would have whose multiplications are saved by
    mixing; `auto` are the forms that it takes.
    """
    rows, cases = [], list(itertools.product(NEARLY_EVEN, CHANNELS))
    for numbers, ((sizes, size), (c, out)) in itertools.product(precisions(), cases):
        precision = getattr(torch, numbers)
        usual = IntermediateBlock(c, out, len(sizes), sizes, bias=False)
        without = IntermediateBlock(c, out, len(sizes), sizes, bias=False)
        without.compiles = lambda: False
        forms = [forms_taken(layer, c, size, precision) for layer in (usual, without)]
        candidates = {
            "compiled": block(c, out, size, sizes, "compiled", precision),
            "other": there_and_back(without, c, size, LAST, precision),
        }
        seconds = one_after_another(candidates, ROUNDS_NEARLY_EVEN)
        rows.append(
            {"precision": numbers, "in": c, "out": out, "map": size,
             "kernels": "+".join(map(str, sizes)),
             "saved": (sum(k * k for k in sizes) / max(sizes) ** 2 - 1) * size**2,
             "auto": forms[0], "other": forms[1], "milliseconds": 1e3 * seconds["compiled"],
             "ratio": seconds["compiled"] / seconds["other"]}
        )  # fmt: skip
        case = "{precision}, {in}→{out} at {map}×{map}, kernels {kernels}, {saved:.1f} saved"
        print(f"{case}: {{ratio:.2f}} of {{other}}".format(**rows[-1]), flush=True)
    return pd.DataFrame(rows)


def forms_taken(layer: IntermediateBlock, c: int, size: int, precision: torch.dtype) -> str:
    """The forms that a block takes for maps of that shape, a + between them."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        return "+".join(form for form, _ in layer.parts(torch.empty(1, c, size, size)))


def step_of(
    batch: int,
    form: str = "auto",
    size: int = 32,
    layout: str = LAST,
    compiled: bool = False,
    recorded: bool = False,
    **settings: Any,
) -> Callable[[], object]:
    """A training step of the quick network on one batch of random images: loss, gradients, and the
    optimisers' steps.

    Args:
        batch: images.
        form: of every block.
        size: height and width of the images in pixels.
        layout: memory format of the network and its maps.
        compiled: whether the network goes through torch.compile, all but the blocks' own functions.
        recorded: whether the step is replayed from a recording, as a GPU trains.
        settings: parameters that differ from the quick preset's.
    """
    chosen, layout = runs.Settings(**settings), getattr(torch, layout)
    precision = runs.pick_precision(chosen.precision, device())
    network = chosen.network().to(memory_format=layout).train()
    for one in network.blocks:
        one.form = form
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=layout)
    network.fit_stem(x)
    labels = torch.randint(10, (batch,))
    optimizers = training.make_optimizers(network, chosen, precision)
    if compiled:
        network = torch.compile(network)
    weights = torch.ones(len(x))

    def step(*batch: Tensor) -> tuple[Tensor, ...]:
        smoothing = chosen.label_smoothing
        return training.train_batch(network, *batch, optimizers, smoothing, precision)

    if recorded:
        step = training.Replayed(step, network, torch.cuda.Stream())
    return lambda: step(x, labels, weights)


def bench_steps() -> pd.DataFrame:
    """A training step of the quick network with L branches in each block, all 3×3, over L = 1, in
    each precision that the device is made for."""
    rows, cases = [], list(itertools.product(("branches", "auto"), BRANCHES))
    recorded = device().type == "cuda"
    for numbers in precisions():
        settings = {"recorded": recorded, "kernel_size": 3, "precision": numbers}
        candidates = {(form, L): step_of(250, form, branches=L, **settings) for form, L in cases}
        for step in candidates.values():  # those before the recording, and the first of it
            for _ in range(5 if recorded else 1):
                step()
        seconds = one_after_another(candidates, ROUNDS_OF_STEPS)
        for form, L in cases:
            rows.append(
                {"precision": numbers, "form": form, "L": L,
                 "milliseconds": 1e3 * seconds[form, L],
                 "ratio": seconds[form, L] / seconds[form, 1]}
            )  # fmt: skip
            print(f"step, {numbers}, {form}, L = {L}: {rows[-1]['ratio']:.2f}", flush=True)
    return pd.DataFrame(rows)


def network_of_full() -> dict[str, Any]:
    """The network's parameters in the preset `full`."""
    full = runs.read_preset("full")
    return {name: full[name] for name in runs.NETWORK}


def bench_full() -> pd.DataFrame:
    """A training step of the network of the preset `full`, on images of the sizes that its training
    and that of `wide-blocks`, its first part, see, over the same as written."""
    rows, forms = [], ("branches", "fused", "auto")
    for size in (32, 24, 16):
        candidates = {form: step_of(250, form, size, **network_of_full()) for form in forms}
        for step in candidates.values():  # whose first steps find their memory
            step()
        seconds = one_after_another(candidates, rounds=5)
        for form in forms:
            rows.append(
                {"size": size, "form": form, "milliseconds": 1e3 * seconds[form],
                 "ratio": seconds[form] / seconds["branches"]}
            )  # fmt: skip
            print(f"full, {size}×{size}, {form}: {rows[-1]['ratio']:.2f}", flush=True)
    return pd.DataFrame(rows)


# Groups of operations in the order in which they are looked for in a name. On a GPU no block is
# evaluated by products of matrices: all of them are the optimiser's and the gates'.
PRODUCTS = ("bmm", "baddbmm", "aten::mm", "addmm")
CONVOLUTIONS = {
    "cpu": {"convolutions and their products": ("conv", "CompiledConvolution", *PRODUCTS)},
    "cuda": {"convolutions": ("conv",), "products of optimiser and gates": PRODUCTS},
}
OTHERS = {
    "batch normalisation": ("batch_norm",),
    "activations": ("silu",),
    "pooling": ("pool",),
    "copies between layouts": ("copy_", "contiguous", "clone"),
}


def bench_profile(**settings: Any) -> pd.DataFrame:
    """Where the time of a training step of the quick network goes: a row a group of operations.

    Args:
        settings: parameters that differ from the quick preset's.
    """
    step, on_gpu = step_of(250, **settings), device().type == "cuda"
    groups = CONVOLUTIONS[device().type] | OTHERS
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiled:
        for _ in range(3):
            step()
    spent = dict.fromkeys([*groups, "everything else"], 0.0)
    for event in profiled.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # counted with the operation that called it
        found = (group for group, words in groups.items() if any(w in event.key for w in words))
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[next(found, "everything else")] += time
    rows = pd.DataFrame({"what": spent.keys(), "share": spent.values()})
    rows["share"] /= rows["share"].sum()
    print(rows.to_string(index=False), flush=True)
    return rows


def bench_profile_full() -> pd.DataFrame:
    """The same for the network of the preset `full`."""
    return bench_profile(**network_of_full())


# What else a step could be: arguments of `step_of`, or what is done first in the process.
TRIED: dict[str, dict[str, Any]] = {
    "blocks as written": {"form": "branches"},
    "weighted sum in one pass, nothing else": {"form": "fused"},
    "weights multiplied with each block's input": {"form": "scaled"},
    "products of patches in every block": {"form": "products"},
    "mixed kernels in every block": {"form": "grouped"},
    "mixed kernels, compiled, in every block": {"form": "compiled"},
    "contiguous maps": {"layout": "contiguous_format"},
    "freed memory given back": {"keep": False},
    "denormal numbers kept": {"flush": False},
    "one thread": {"threads": 1},
    "float32": {"precision": "float32"},
    "ReLU for SiLU": {"activation": "relu"},
    "torch.compile": {"compiled": True},
    "batches of 125": {"batch": 125},
    "batches of 500": {"batch": 500},
    "batches of 1,000": {"batch": 1000},
    "images of 16×16": {"size": 16},
    "images of 20×20": {"size": 20},
    "images of 24×24": {"size": 24},
    "images of 28×28": {"size": 28},
}


def bench_tried() -> pd.DataFrame:
    """A training step of the quick network in other ways, over the step as it is.

    Each is measured in a process of its own, between two that measure the step as it is; a
    `ratio` below 1 is quicker for each image. `first` are the seconds of the first step.
    """
    rows, before = [], fresh_process(time_step, {})
    for name, options in TRIED.items():
        if options.get("form") == "compiled" and mixing.missing():
            continue
        tried, after = fresh_process(time_step, options), fresh_process(time_step, {})
        usual = (before["milliseconds"] + after["milliseconds"]) / 2
        rows.append({"tried": name, **tried, "ratio": tried["milliseconds"] / usual})
        print(f"{name}: {rows[-1]['ratio']:.2f}", flush=True)
        before = after
    return pd.DataFrame(rows)


def time_step(
    batch: int = 250,
    keep: bool = True,
    flush: bool = True,
    threads: int = 0,
    **options: Any,
) -> dict[str, float]:
    """The milliseconds of a step for each image, and the seconds of the first step.

    Args:
        keep, flush: `keep_freed_memory` and `set_flush_denormal`, as in a run, or not.
        threads: 0 for as many as the machine has cores.
        batch, options: of `step_of`.
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(flush)
    if keep:
        runs.keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    step = step_of(batch, **options)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    seconds = one_after_another({"step": step}, rounds=1, repeats=4)["step"]
    return {"milliseconds": 1e3 * seconds / batch, "first": first}


def fresh_process(measure: Callable, options: dict[str, Any]) -> Any:
    """What `measure(**options)` returns in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, kwds=options)


def peak(precision: str, form: str, L: int) -> float:
    """The largest memory that this process needs for a step, in MiB, without the reserves that a
    training keeps; or that of the GPU."""
    runs.give_back_freed_memory()
    step = step_of(512, form, branches=L, kernel_size=3, precision=precision)
    step()  # in which there are no momenta yet
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    step()
    # What getrusage says would include that of the process which started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))[1]) / 1024


def bench_memory() -> pd.DataFrame:
    """Peak memory of a step at batch 512, in each precision that the device is made for: of a
    fresh process for each, or of the GPU."""
    rows, on_gpu = [], device().type == "cuda"
    for numbers, form, L in itertools.product(precisions(), ("branches", "auto"), BRANCHES):
        one = {"precision": numbers, "form": form, "L": L}
        rows.append({**one, "MiB": peak(**one) if on_gpu else fresh_process(peak, one)})
        print("memory, {precision}, {form}, L = {L}: {MiB:.0f} MiB".format(**rows[-1]), flush=True)
    return pd.DataFrame(rows)


MEASUREMENTS: dict[str, Callable[[], pd.DataFrame]] = {
    "blocks": bench_blocks, "compiled": bench_compiled, "steps": bench_steps, "full": bench_full,
    "profile": bench_profile, "profile_full": bench_profile_full, "tried": bench_tried,
    "memory": bench_memory,
}  # fmt: skip
STATUS = Path("/proc/self/status")  # where Linux says how much memory a process has had
# What is not measured elsewhere.
ONLY = {"compiled": "cpu", "tried": "cpu", "full": "cpu", "profile_full": "cuda"}


def another_machine(folder: Path, machine: dict[str, Any]) -> str:
    """The machine that the tables of a folder are of, if it is not this one with these versions."""
    if not (folder / "machine.json").is_file():
        return "no machine yet"
    there = runs.read_json(folder / "machine.json")
    hardware, here = there["hardware"], machine["hardware"]
    if any(hardware.get(key) != here.get(key) for key in ("processor", "threads", "gpu")):
        return runs.benchmark_machine(folder)
    known = there["versions"]["torch"]
    return "" if known == machine["versions"]["torch"] else f"torch {known}"


def keep(folder: Path, name: str, table: pd.DataFrame, machine: dict[str, Any]) -> None:
    """Write a table, and into `machine.json` when it was measured.

    Args:
        machine: this one, from `runs.surroundings`; `finished` becomes the time of the oldest
            table, so that a folder is as new as all that is in it.
    """
    path = folder / "machine.json"
    measured = runs.read_json(path)["measured"] if path.is_file() else {}
    measured[name] = datetime.now(UTC).isoformat(timespec="seconds")
    content = runs.as_bytes(table.to_csv(index=False, float_format="%.4g"))
    runs.write_aside(folder / f"{name}.csv", content)
    oldest = min(measured.values())
    runs.write_json(path, machine | {"finished": oldest, "measured": measured})


def main(arguments: list[str] | None = None) -> None:
    """See the module's first lines; ends with one sentence and status 1 if something stops it."""
    stopped = (
        "Stopped from the keyboard; the tables of before are as they were, and those that were "
        "finished in notebooks/benchmarks/underway/."
    )
    with runs.ending_in_a_sentence((runs.RunError,), stopped):
        measure(arguments)


def measure(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Measure what blocks and training steps cost.")
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    known = [t for t in MEASUREMENTS if ONLY.get(t, given.device) == given.device]
    if given.device == "cpu" and not STATUS.is_file():
        known.remove("memory")
    if given.device == "cpu" and mixing.missing():
        known.remove("compiled")
    tables = given.tables or known
    if unknown := set(tables) - set(known):
        parser.error(f"{', '.join(unknown)} not measured here; what is: {', '.join(known)}")
    try:
        torch.set_default_device(runs.pick_device(given.device))
    except runs.ParameterError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    runs.keep_freed_memory()
    machine = runs.surroundings(device(), "auto")
    on_gpu = device().type == "cuda"
    folder = runs.BENCHMARKS / ("GPU" if on_gpu else machine["hardware"]["instructions"])
    if given.tables and (other := another_machine(folder, machine)):
        parser.error(f"{runs.place(folder)} is of {other}; measure all tables here, not some")
    if given.tables:
        for name in tables:
            keep(folder, name, MEASUREMENTS[name](), machine)
        return
    # All tables together replace the old ones in the end, which may be another machine's.
    target = runs.BENCHMARKS / "underway" / folder.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in tables:
        keep(target, name, MEASUREMENTS[name](), machine)
    shutil.rmtree(folder, ignore_errors=True)
    target.rename(folder)


if __name__ == "__main__":
    main()
