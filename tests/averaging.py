"""Does an average of the weights classify better than the last ones? `python tests/averaging.py`

Trains the preset `quick` on 45,000 images, three seeds, and beside it keeps exponential averages of
its weights; at the end each gets its own statistics of batch normalisation and is judged by the
5,000 images held out. Ten minutes on two cores with bfloat16. It writes
`notebooks/benchmarks/averaging.json`.
"""

from __future__ import annotations

import copy
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from helpers import data, evaluation, runs, training

DECAYS = (0.9, 0.98, 0.995)  # of an average, a step; there are a hundred and eighty in an epoch
SEEDS = (0, 1, 2)


def train(images: data.ImageData, settings: runs.Settings) -> dict[str, nn.Module]:
    """The network with its last weights, and with each average of them."""
    part, _ = runs.training_parts(images, settings)
    underway = training.Underway(training.first_network(part, settings), part, settings)
    weights = list(underway.network.parameters())
    averages = {decay: [w.detach().clone() for w in weights] for decay in DECAYS}
    step = underway.step

    def step_and_average(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = step(*inputs)
        with torch.no_grad():
            for decay, average in averages.items():
                torch._foreach_lerp_(average, weights, 1 - decay)
        return outputs

    underway.step = step_and_average
    for epoch in range(1, settings.epochs + 1):
        underway.begin_epoch(epoch)
        training.train_epoch(underway, save=lambda: None)
    networks = {"last": underway.network}
    for decay, average in averages.items():
        networks[f"{decay}"] = copy.deepcopy(underway.network)
        for own, averaged in zip(networks[f"{decay}"].parameters(), average, strict=True):
            own.data.copy_(averaged)
    for network in networks.values():
        training.settle_statistics(network, part, settings)
    return networks


def main() -> None:
    images, said = data.load_data(), {}
    if images.name != "cifar10":
        raise SystemExit("CIFAR-10 is not here, and what learns from the stand-in says nothing.")
    runs.keep_freed_memory()
    for seed in SEEDS:
        settings = runs.settings_from(
            runs.read_preset("quick") | {"seed": seed, "validation": 5000}
        )
        _, held_out = runs.training_parts(images, settings)
        for name, network in train(images, settings).items():
            right = evaluation.correct(evaluation.predict(network, held_out), held_out.labels)
            said.setdefault(name, []).append(right / len(held_out))
            print(f"seed {seed}, {name}: {said[name][-1]:.2%}", flush=True)
    record: dict[str, Any] = {"validation_accuracy": said}
    for name in said:
        more = [100 * (a - b) for a, b in zip(said[name], said["last"], strict=True)]
        record.setdefault("points_more", {})[name] = [round(mean(more), 3), round(stdev(more), 3)]
    machine = runs.surroundings(torch.device("cpu"), "auto")
    runs.write_json(runs.BENCHMARKS / "averaging.json", record | machine)


if __name__ == "__main__":
    main()
