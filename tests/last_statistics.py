"""What do batch normalisation's last statistics do to the reported network, if they come of clean
or of augmented training images? `python tests/last_statistics.py`

For each the network gets its statistics anew and answers 10,000 training images of which they were
not made, and the test images. It decides nothing: which the preset takes was settled before. Three
minutes on two cores. It writes `notebooks/benchmarks/last_statistics.json`.
"""

from __future__ import annotations

import dataclasses

import torch

from helpers import data, evaluation, report, runs, training


def main() -> None:
    images, said = data.load_data(), {}
    if images.name != "cifar10":
        raise SystemExit("CIFAR-10 is not here, and the network knows nothing else.")
    run = runs.read(report.best_run())
    first = training.IMAGES_FOR_STATISTICS
    sets = {"training": images.train.subset(torch.arange(first, 2 * first)), "test": images.test}
    for statistics in ("clean images", "augmented images"):
        network = runs.load_network(run)
        settings = dataclasses.replace(runs.settings_of(run), statistics=statistics)
        training.settle_statistics(network, images.train, settings)
        for name, own in sets.items():
            accuracy = evaluation.accuracy(evaluation.predict(network, own), own.labels)
            said.setdefault(statistics, {})[name] = accuracy
            print(f"{statistics}, {name}: {accuracy:.2%}", flush=True)
    record = {"run": run.name, "accuracy": said}
    machine = runs.surroundings(torch.device("cpu"))
    runs.write_json(runs.BENCHMARKS / "last_statistics.json", record | machine)


if __name__ == "__main__":
    main()
