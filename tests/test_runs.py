"""Parameters are checked at once, and a record holds what the run was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import nbformat
import pandas as pd
import pytest
import torch
import yaml

from helpers import data, evaluation, report, runs
from helpers.evaluation import mean_and_deviation
from helpers.runs import ParameterError, RunError, Settings

PRESETS = sorted(runs.PRESETS.glob("*.yaml"))
# The runs whose weights are in the repository.
IGNORED = (data.ROOT / ".gitignore").read_text(encoding="utf-8")
KEPT = re.findall(r"^!/notebooks/runs/(.*)/weights.pt$", IGNORED, flags=re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("epochs", "1e-3", "integer"),
        ("epochs", 0, "from 1"),
        ("epochs", True, "integer"),
        ("seed", -1, "from 0"),
        ("seed", 1.5, "integer"),
        ("learning_rate", "1e-3", "with a point"),  # as YAML gives an unpointed 1e-3
        ("learning_rate", float("nan"), "number"),
        ("learning_rate", float("inf"), "number"),
        ("learning_rate", -0.1, "from 0"),
        ("label_smoothing", 1.0, "0.999"),
        ("widths", "(1, 2)", "list"),  # as papermill gives a tuple
        ("widths", [64, "128"], "list"),
        ("widths", [], "widths"),
        ("branches", [2, 2], "blocks"),
        ("branches", 0, "integer"),
        ("kernel_size", 4, "even"),
        ("pool_after", [9], "blocks are 1 to"),
        ("stem_filters", 3, "even"),
        ("stem_stride", 3, "from 1 to 2"),
        ("gate", "tanh", "linear, softmax, sigmoid"),
        ("activation", None, "none, relu"),
        ("flip", "yes", "true or false"),
        ("first_sizes", [4], "from 8 to 32"),
        ("first_sizes", [16] * 10_000, "fewer sizes than the run has epochs"),
        ("pool_after", [1, 2, 3, 4, 5, 6], "leaves no map"),
        ("run", "../elsewhere", "letters"),
        ("preset", "", "letters"),
        ("translate", 32, "31"),
        ("train_images", 60_000, "50000"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: object, remedy: str) -> None:
    with pytest.raises(ParameterError) as caught:
        Settings(**{name: value})
    assert name.replace("_", " ") in str(caught.value).replace("_", " ")
    assert remedy in str(caught.value)


# For each parameter, what is of the wrong type, out of range or not finite.
NOT_WHOLE = (None, True, 1.5, "2", "1e-3", [1], float("nan"), float("inf"), -1, 10**12)
NOT_REAL = (None, True, "0.1", "1e-3", [0.1], float("nan"), float("inf"), -0.1, 10**12, 10**400)
NOT_WHOLES = (None, True, 0.5, "[1, 2]", [0], [1.5], [True], [None], [-3], {"a": 1}, [10**12])
NOT_A_NAME = (None, 3, True, "../up", "a/b", "a b", ["quick"], "-p")
REFUSED = {
    "preset": (*NOT_A_NAME, ""), "run": NOT_A_NAME, "device": (*NOT_A_NAME, "", "tpu", "cuda:99"),
    "seed": NOT_WHOLE, "validation": NOT_WHOLE, "train_images": NOT_WHOLE,
    "basic_images": (*NOT_WHOLE, 0), "stem_filters": (*NOT_WHOLE, 7), "stem_stride": NOT_WHOLE,
    "epochs": (*NOT_WHOLE, 0), "batch_size": (*NOT_WHOLE, 0), "translate": NOT_WHOLE,
    "cutout": (*NOT_WHOLE, 32), "start_from": NOT_A_NAME, "trivial_augment": (*NOT_REAL, 1.1),
    "measure_training_every": (*NOT_WHOLE, 0),
    "learning_rate": NOT_REAL, "momentum": (*NOT_REAL, 1), "adam_learning_rate": NOT_REAL,
    "label_smoothing": (*NOT_REAL, 1), "skip_easy": (*NOT_REAL, 1), "temperature": (*NOT_REAL, 0.5),
    "widths": (*NOT_WHOLES, []), "first_sizes": (*NOT_WHOLES, [33], [7]),
    "pool_after": (*NOT_WHOLES, [7]), "residual": (*NOT_WHOLES, [7], [3]),
    "branches": (*NOT_WHOLES, 0, [2]), "kernel_size": (*NOT_WHOLES, 2, [3, 2]),
    "strides": (*NOT_WHOLES, 0),
    "gate": (*NOT_A_NAME, "Softmax"), "activation": (*NOT_A_NAME, "swish"),
    "precision": (*NOT_A_NAME, "", "float16", "bfloat16x2"),
    "statistics": (*NOT_A_NAME, "", "clean", "Running"),
    "flip": (None, 1, 0.0, "true", "yes", [True]), "normalise": (None, 1, 0.0, "true", [True]),
}  # fmt: skip


def test_every_parameter_has_values_to_refuse() -> None:
    assert set(REFUSED) == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]]
)
def test_the_table_of_wrong_values(name: str, value: object) -> None:
    """Refused before any image is read, in one sentence that names the parameter and a remedy."""
    with pytest.raises(ParameterError) as caught:
        runs.settings_from({name: value})
    said = str(caught.value)
    assert name in said or name.replace("_", " ") in said
    assert "\n" not in said and len(said) < 700


@pytest.mark.parametrize(
    ("line", "value"),
    [("learning_rate: 1e-3", "1e-3"), ("momentum: .nan", "nan"), ("epochs: '6'", "6"),
     ("flip: 'no'", "no"), ("widths: 32", "32"), ("seed:", "None"), ("gate: false", "False")],
)  # fmt: skip
def test_what_yaml_makes_of_a_line_is_checked_too(line: str, value: str) -> None:
    given = yaml.safe_load(line)
    with pytest.raises(ParameterError, match=rf"^Parameter {next(iter(given))} = '?{value}"):
        runs.settings_from(given)


# Training has told the processor to take the smallest of them for 0.
FLOATS = st.floats(allow_subnormal=False)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from([f.name for f in dataclasses.fields(Settings)]), ANYTHING)
def test_any_value_is_taken_as_it_is_or_refused_in_one_sentence(name: str, value: object) -> None:
    try:
        taken = Settings(**{name: value})
    except ParameterError as error:
        said = str(error)
        assert "\n" not in said.replace(repr(value), "")
        several = ("fit together", "leaves no map", "fewer sizes than the run has epochs")
        assert f"{name} = {value!r}" in said or any(words in said for words in several)
    else:
        assert getattr(taken, name) is value


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**32 - 1),
            "epochs": st.integers(4, 10_000),
            "first_sizes": st.lists(st.integers(8, 32), max_size=2),
            "learning_rate": st.floats(0, 100, allow_subnormal=False),
            "branches": st.integers(1, 4),
            "kernel_size": st.sampled_from([1, 3, 5, 7]),
            "flip": st.booleans(),
        }
    )
)
def test_settings_survive_yaml_and_json(values: dict) -> None:
    chosen = Settings(**values)
    written = dataclasses.asdict(chosen)
    assert Settings(**yaml.safe_load(yaml.safe_dump(written))) == chosen
    assert Settings(**json.loads(json.dumps(written))) == chosen


def test_check_parameters_takes_the_notebooks_variables() -> None:
    namespace = {"seed": 7, "epochs": 9, "something_else": object(), "In": ["seed = 0"]}
    assert runs.check_parameters(namespace) == Settings(seed=7, epochs=9)


def test_a_name_that_papermill_injects_and_nobody_knows_is_refused() -> None:
    injected = "# Parameters\nseed = 3\nmomentun = 0.9\n"
    with pytest.raises(ParameterError, match="momentun"):
        runs.check_parameters({"seed": 3, "momentun": 0.9, "In": ["", "seed = 0", injected]})


def test_a_misspelt_line_of_the_edited_cell_is_refused_until_it_is_mended() -> None:
    wrong, right = (f'preset = "quick"\nseed = 0\n{name} = 1' for name in ("epoch", "epochs"))
    namespace = {"preset": "quick", "seed": 0, "epoch": 1, "first_sizes": [], "epochs": 1}
    for cells in (["", wrong], ["", right, "%cd ..", wrong]):
        with pytest.raises(ParameterError, match="Parameter epoch is not known"):
            runs.check_parameters(namespace | {"In": cells})
    injected = "# Parameters\nmomentun = 0.9\n"
    cells = ["", wrong, injected, right, "run = runs.read(run)"]
    assert runs.check_parameters(namespace | {"In": cells}).epochs == 1


@pytest.mark.parametrize("name", report.SEQUENCE)
def test_no_later_cell_takes_the_name_of_a_parameter(name: str) -> None:
    """So that the cell that checks them can be run again; a run is given and taken by its name."""
    cells = nbformat.read(data.ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    own = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = {field.name for field in dataclasses.fields(Settings)} - {"run"}
    for cell in cells:
        if cell.cell_type == "code" and cell not in own:
            assert not known & set(runs.assigned(cell.source)), cell.source


def test_presets_are_complete_and_pass_the_checks() -> None:
    expected = {
        "smoke", "eight-minutes", "quick", "hour", "wide-blocks", "full", "longer", "study",
    }  # fmt: skip
    assert {path.stem for path in PRESETS} == expected
    for path in PRESETS:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        settings = Settings(**values)
        names = {field.name for field in dataclasses.fields(Settings)} - {"seed", "run"}
        assert set(values) == names, path.name
        assert settings.preset == path.stem
    quick = yaml.safe_load((runs.PRESETS / "quick.yaml").read_text(encoding="utf-8"))
    assert Settings(**quick) == Settings()


def test_every_preset_has_two_branches_at_least_in_every_block() -> None:
    for path in PRESETS:
        settings = Settings(**yaml.safe_load(path.read_text(encoding="utf-8")))
        with torch.device("meta"):
            assert all(len(block.branches) >= 2 for block in settings.network().blocks)


def test_the_temperature_falls_to_one_in_the_first_half() -> None:
    for epochs, expected in {1: [1], 2: [31, 1], 6: [31, 21, 11, 1, 1, 1]}.items():
        settings = Settings(temperature=31.0, epochs=epochs, first_sizes=[])
        temperatures = [settings.temperature_in(epoch) for epoch in range(1, epochs + 1)]
        assert temperatures == pytest.approx(expected)
    assert {Settings().temperature_in(epoch) for epoch in range(1, 7)} == {1.0}
    with pytest.raises(ParameterError, match=r"temperature = 2\.0: gate linear has none"):
        Settings(temperature=2.0, gate="linear")


def test_an_unknown_device_is_refused() -> None:
    for name in ("meta", "cuda:1", "tpu"):
        with pytest.raises(ParameterError, match=f"'{name}': it must be auto, cpu or cuda"):
            Settings(device=name)
    with pytest.raises(ParameterError, match="cuda:99"):
        runs.pick_device("cuda:99")
    assert runs.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("able", [False, True])
def test_bfloat16_needs_a_processor_that_calculates_with_it(
    monkeypatch: pytest.MonkeyPatch, able: bool
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert runs.pick_precision("float32", cpu) == torch.float32
    assert runs.pick_precision("auto", cpu) == (torch.bfloat16 if able else torch.float32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    gpu = torch.device("cuda")
    assert runs.pick_precision("auto", gpu) == (torch.bfloat16 if able else torch.float32)
    if able:
        assert runs.pick_precision("bfloat16", cpu) == torch.bfloat16
        return
    with pytest.raises(ParameterError, match=r"precision = 'bfloat16'.* use auto or float32"):
        runs.pick_precision("bfloat16", cpu)
    if not torch.cuda.is_available():
        with pytest.raises(ParameterError, match="no such device"):  # at once, not when it is used
            runs.check_parameters({"device": "cuda"})


NO_METRICS = dict.fromkeys(runs.METRICS)  # all that a record holds, without values


def write_run(settings: Settings, images: data.ImageData) -> runs.Run:
    metrics = NO_METRICS | {"dataset": images.name, "test_accuracy": 0.6}
    with runs.Record(settings, images) as record:
        for epoch, accuracy, loss in ((1, 0.5, 2.0), (2, 0.6, 1.0)):
            row = {"epoch": epoch, "test_accuracy": accuracy}
            record.add_epoch(row, [{"epoch": epoch, "batch": 1, "loss": loss}])
        return record.finish(settings.network(), metrics)


def small(name: str = "") -> Settings:
    return Settings(widths=[4], branches=2, pool_after=[], stem_filters=0, run=name)


def test_a_record_reads_back_as_it_was_written(folder: Path, tiny_images: data.ImageData) -> None:
    run = write_run(small(), tiny_images)
    again = runs.read("quick-seed0")
    weights = (folder / "quick-seed0" / "weights.pt").read_bytes()
    checksum = {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    expected = NO_METRICS | {"dataset": "stand-in", "test_accuracy": 0.6, "interruptions": 0}
    expected |= checksum
    assert again.metrics == run.metrics == expected
    assert again.config["dataset"] == "stand-in"
    assert again.history["test_accuracy"].tolist() == [0.5, 0.6]
    assert again.batches["loss"].tolist() == [2.0, 1.0]
    assert runs.settings_of(again) == small("quick-seed0")
    x = torch.randn(2, 3, 32, 32)
    state = torch.load(folder / "quick-seed0" / "weights.pt", weights_only=True)
    fresh = small().network()
    fresh.load_state_dict(state)
    torch.testing.assert_close(runs.load_network(again)(x), fresh.eval()(x))


def test_what_is_known_after_an_epoch_is_on_disk_after_it(
    folder: Path, tiny_images: data.ImageData
) -> None:
    with runs.Record(small(), tiny_images) as record:
        row = {"epoch": 1, "test_accuracy": 0.5}
        record.add_epoch(row, [{"epoch": 1, "batch": 1, "loss": 2.0}])
    assert len(pd.read_csv(folder / record.name / "history.csv")) == 1
    assert json.loads((folder / record.name / "config.json").read_text())["seed"] == 0
    with pytest.raises(RunError, match="not finished"):
        runs.read(record.name)


def test_two_runs_never_share_a_name(folder: Path, tiny_images: data.ImageData) -> None:
    assert write_run(small(), tiny_images).name == "quick-seed0"
    assert write_run(small(), tiny_images).name == "quick-seed0-2"
    assert runs.latest("quick-seed0") == "quick-seed0-2"
    with pytest.raises(RunError, match="quick-seed0-2 is there already"):
        runs.Record(small("quick-seed0-2"), tiny_images).__enter__()
    for name, day in (("quick-seed0", 2), ("quick-seed0-2", 1)):  # the first name was free again
        runs.write_json(folder / name / "metrics.json", {"finished": f"2026-01-0{day}"})
    assert runs.latest("quick-seed0") == "quick-seed0"


def test_a_run_whose_beginning_is_gone_says_so(folder: Path, tiny_images: data.ImageData) -> None:
    run = write_run(small("mine"), tiny_images)
    run.config["start_from"] = "gone"
    with pytest.raises(RunError, match=r"mine went on from another.*delete .*mine.*run gone"):
        runs.lineage(run)


def test_latest_does_not_take_another_seeds_run(folder: Path, tiny_images: data.ImageData) -> None:
    write_run(small("quick-seed10"), tiny_images)
    with pytest.raises(RunError, match=r"no finished run quick-seed1;.*quick-seed10"):
        runs.latest("quick-seed1")
    with runs.Record(Settings(seed=1), tiny_images):
        pass
    with pytest.raises(RunError, match="quick-seed1 is not finished"):  # and not: there is none
        runs.read(runs.latest("quick-seed1"))


def test_a_batch_of_one_image_is_refused_where_nothing_can_be_normalised() -> None:
    tight = Settings(first_sizes=[8], batch_size=2)  # three poolings leave one position of 8×8
    with pytest.raises(ParameterError, match=r"batch_size = 2: of 2,001 images .* batch of one"):
        runs.check_batches(tight, 2001)
    runs.check_batches(tight, 2000)
    runs.check_batches(dataclasses.replace(tight, batch_size=100, skip_easy=0.5), 2001)
    runs.check_batches(dataclasses.replace(tight, first_sizes=[]), 2001)
    with pytest.raises(ParameterError, match="batch_size = 1:"):
        runs.check_batches(dataclasses.replace(tight, batch_size=1), 2000)
    with pytest.raises(ParameterError, match="no skip_easy"):  # how many are left is not known yet
        runs.check_batches(dataclasses.replace(tight, skip_easy=0.5), 2000)


def test_tuples_of_a_notebook_are_the_lists_of_its_record(
    folder: Path, tiny_images: data.ImageData
) -> None:
    settings = Settings(widths=(8, 8), pool_after=(1,), first_sizes=(16,), run="tuples")
    for _ in range(2):  # the second time it is continued
        with runs.Record(settings, tiny_images) as record:
            assert record.config["widths"] == [8, 8]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.pt", b"PK", "are not those of run quick-seed0 or cannot be read"),
        ("weights.pt", None, "has no weights here"),
        ("config.json", b"[]", "config.json cannot be read"),
        ("config.json", b'{"version": "x"}', "record of version x"),
        ("metrics.json", b"{", "metrics.json cannot be read"),
        ("history.csv", b"", "tables of run quick-seed0 cannot be read"),
        ("history.csv", None, "tables of run quick-seed0 cannot be read"),
        ("failed.json", b"{}", "Run quick-seed0 failed"),
    ],
)
def test_a_damaged_record_is_refused_by_name(
    folder: Path, tiny_images: data.ImageData, name: str, content: bytes | None, said: str
) -> None:
    path = write_run(small(), tiny_images).folder / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=said):
        runs.load_network(runs.read("quick-seed0"))


@pytest.mark.parametrize(("name", "key"), [("config.json", "widths"), ("metrics.json", "hardware")])
def test_a_record_without_what_every_record_holds_is_refused(
    folder: Path, tiny_images: data.ImageData, name: str, key: str
) -> None:
    path = write_run(small(), tiny_images).folder / name
    content = runs.read_json(path)
    del content[key]
    runs.write_json(path, content)
    with pytest.raises(RunError, match=rf"{name} lacks {key}; restore it"):
        runs.read("quick-seed0")
    runs.write_json(path, {})
    with pytest.raises(RunError, match=rf"{name} lacks dataset, preset"):
        runs.read("quick-seed0")


def test_weights_of_another_run_are_refused(folder: Path, tiny_images: data.ImageData) -> None:
    run, other = (write_run(small(f"run-{k}"), tiny_images) for k in (1, 2))
    (run.folder / "weights.pt").write_bytes((other.folder / "weights.pt").read_bytes())
    with pytest.raises(RunError, match="are not those of run run-1"):
        runs.load_network(run)


@pytest.mark.skipif(bool(data.missing_files(data.cifar10_folder())), reason="no CIFAR-10 here")
@pytest.mark.parametrize("name", KEPT)
def test_kept_weights_give_the_stated_accuracy(name: str) -> None:
    """To the image; `load_network` has compared their checksum."""
    run = runs.read(name)
    test = data.read_cifar10(data.cifar10_folder()).test
    measured = evaluation.accuracy(evaluation.predict(runs.load_network(run), test), test.labels)
    assert measured == run.metrics["test_accuracy"]


def test_missing_runs_and_weights_are_named(folder: Path, tiny_images: data.ImageData) -> None:
    with pytest.raises(RunError, match="no run nothing"):
        runs.read("nothing")
    run = write_run(small(), tiny_images)
    (run.folder / "weights.pt").unlink()
    with pytest.raises(RunError, match="no weights"):
        runs.load_network(run)


def test_a_run_is_not_analysed_on_other_data(folder: Path, tiny_images: data.ImageData) -> None:
    run = write_run(small(), tiny_images)
    runs.check_same_data(run, tiny_images)
    with pytest.raises(RunError, match="stand-in"):
        runs.check_same_data(run, dataclasses.replace(tiny_images, name="cifar10"))


def test_more_images_than_are_left_beside_those_held_out_are_refused() -> None:
    assert Settings(validation=45_000, train_images=5000).images_of(50_000) == 5000
    with pytest.raises(ParameterError, match=r"train_images = 5001: .* only 5000 are left"):
        Settings(validation=45_000, train_images=5001)


def test_training_parts_hold_out_what_is_asked(tiny_images: data.ImageData) -> None:
    training, validation = runs.training_parts(tiny_images, Settings(validation=20))
    assert (len(training), len(validation)) == (len(tiny_images.train) - 20, 20)
    both = torch.cat([training.images, validation.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(tiny_images.train)  # no image in both
    training, validation = runs.training_parts(tiny_images, Settings(train_images=30))
    assert len(training) == 30 and validation is None


def test_accuracy_and_cost_of_everything_that_was_trained(
    folder: Path, tiny_images: data.ImageData
) -> None:
    rows = {
        "run-seed0": (0, 0.5, "cpu"), "run-seed1": (1, 0.7, "cpu"), "other-seed0": (0, 0.4, "cpu"),
        "run-there-seed0": (0, 0.9, "cuda"), "run-seed2": (2, 0.1, "wide"),
    }  # fmt: skip
    hardware = {
        "cpu": {"device": "cpu", "threads": 2, "instructions": "AVX2"},  # before there was a choice
        "cuda": {"device": "cuda", "gpu": "A GPU", "threads": 9, "precision": "bfloat16"},
    }
    hardware["wide"] = hardware["cpu"] | {"threads": 16}
    for name, (seed, accuracy, device) in rows.items():
        widths = [2] if name.startswith("other") else [3]
        settings = Settings(
            run=name, seed=seed, widths=widths, stem_filters=0, pool_after=[], kernel_size=1,
            epochs=2, first_sizes=[16],
        )  # fmt: skip
        metrics = NO_METRICS | {
            "dataset": tiny_images.name, "test_accuracy": accuracy, "train_seconds": 60 * widths[0],
            "seed": seed, "finished": name, "hardware": hardware[device],
        }  # fmt: skip
        with runs.Record(settings, tiny_images) as record:
            for epoch in (1, 2):
                row = {"epoch": epoch, "seconds": 2.0, "images_per_second": 80.0}
                record.add_epoch(row, [{"epoch": epoch, "batch": 1, "loss": 2.0}])
            record.finish(settings.network(), metrics)
    assert runs.by_cost("data without a run").empty
    table = runs.by_cost(tiny_images.name).set_index("kind")
    for kind, expected in {
        "A GPU, bfloat16": ["run-there", 1, 0.9],
        "CPU, AVX2, float32, 16 threads": ["run", 1, 0.1],  # whose minutes are no others'
    }.items():
        assert table.loc[kind, ["run", "n", "accuracy"]].tolist() == expected
    table = table.loc["CPU, AVX2, float32"].set_index("run")
    assert list(table.index) == ["other", "run"] and list(table["n"]) == [1, 2]
    assert table.loc["run", "accuracy"] == pytest.approx(0.6)
    assert table.loc["run", "deviation"] == pytest.approx(0.02**0.5)
    assert list(table["minutes"]) == [2, 3]
    assert table["minutes_deviation"].isna().tolist() == [True, False]
    assert table.loc["run", "minutes_deviation"] == 0
    both = 256 + 1024  # positions in an image of 16×16, as in the first epoch, and in a whole one
    blocks = 2 * 3 * 3 * both + 2 * 3 * 2 + 2 * 3 * both  # two 1×1 convolutions, fc, weighted sum
    assert table.loc["run", "work"] == 3 * 160 * (blocks + 2 * 3 * 10)


def test_a_record_from_before_there_was_a_parameter_is_of_its_default(
    folder: Path, tiny_images: data.ImageData
) -> None:
    old, new = (write_run(small(name), tiny_images) for name in ("old", "new"))
    for run in (old, new):
        run.metrics["hardware"] = {"device": "cpu", "threads": 2}
    del old.config["start_from"], old.config["trivial_augment"], old.config["skip_easy"]
    assert runs.what_counts(old) == runs.what_counts(new)
    assert runs.differences(old, new) == runs.differences(new, old) == "–"
    assert runs.lineage(old) == [old]
    del old.config["statistics"]  # of batch normalisation: then they were not estimated anew
    assert runs.settings_of(old).statistics == "running"
    assert runs.what_counts(old) != runs.what_counts(new)


def test_committed_records_say_what_they_must() -> None:
    """The records that the report speaks of; a copy of the project may have none."""
    keys = {
        "dataset", "preset", "seed", "test_accuracy", "test_accuracy_tta", "validation_accuracy",
        "training_accuracy", "train_seconds", "parameters", "hardware", "versions",
    }  # fmt: skip
    for run in map(runs.read, runs.names()):
        assert keys <= set(run.metrics), run.name
        assert run.metrics["test_accuracy"] == run.history["test_accuracy"].iloc[-1], run.name
        assert len(run.history) == run.metrics["epochs"], run.name
        assert run.config["dataset"] == run.metrics["dataset"], run.name
        settings = runs.settings_of(run)
        seen = (run.history["images_per_second"] * run.history["seconds"]).round()
        assert seen.iloc[0] == settings.images_of(50_000), run.name
        # The loss of each training batch.
        assert len(run.batches) == (seen / settings.batch_size).apply(math.ceil).sum(), run.name


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        (Settings(), "quick"),
        (Settings(seed=1), "quick-seed1"),
        (Settings(run="quick-seed0-2"), "quick-seed0-2"),
        (Settings(preset="full", run="full-seed0"), "full"),
    ],
)
def test_no_run_draws_over_the_figures_of_another(
    settings: Settings, folder: str, tiny_images: data.ImageData
) -> None:
    real = dataclasses.replace(tiny_images, name="cifar10")
    assert runs.label(settings, real) == folder
    assert runs.label(settings, tiny_images) == "stand-in"


def test_choices_are_compared_with_the_base_of_their_family(
    folder: Path, tiny_images: data.ImageData
) -> None:
    for name, changed in {
        "choice-base": {},
        "choice-smaller": {"batch_size": 100},
        "choice-long-base": {"epochs": 20, "first_sizes": [16] * 5},
        "choice-long-wide": {"epochs": 30, "first_sizes": [16] * 5, "widths": [8]},
        "choice-of-fewer": {"train_images": 300, "batch_size": 100},
        "choice-whole": {"train_images": 300},
        "choice-small-first": {"train_images": 300, "epochs": 20},
    }.items():
        settings = dataclasses.replace(small(name), preset="choice", validation=40, **changed)
        with runs.Record(settings, tiny_images) as record:
            record.add_epoch({"epoch": 1}, [{"epoch": 1, "batch": 1, "loss": 1.0}])
            metrics = {"dataset": "stand-in", "preset": "choice", "validation_accuracy": 0.8}
            record.finish(settings.network(), NO_METRICS | metrics)
    table = runs.choices("stand-in").set_index("run")
    assert table["beside"].to_dict() == {
        **dict.fromkeys(("choice-base", "choice-smaller", "choice-long-base"), "choice-base"),
        "choice-long-wide": "choice-long-base",
        "choice-of-fewer": "choice-of-fewer",  # the base has learnt from more images
        **dict.fromkeys(("choice-whole", "choice-small-first"), "choice-whole"),
    }
    assert table["what differs"].to_dict() == {
        "choice-base": "–",
        "choice-smaller": "batch_size = 100",
        "choice-long-base": "first_sizes = [16, 16, 16, 16, 16]",
        "choice-long-wide": "widths = [8]",
        **dict.fromkeys(("choice-of-fewer", "choice-whole", "choice-small-first"), "–"),
    }
    assert table.loc["choice-long-wide", "epochs"] == 30
    assert table["images"].drop_duplicates().tolist() == [50_000 - 40, 300]
    assert runs.choices("cifar10").empty


def test_the_same_parameters_on_another_machine_are_found() -> None:
    """Whatever the preset was called when the run was made, and whatever it went on from."""
    for name, own, elsewhere in (("full", 1, ["full-seed1"]), ("hour", 2, []), ("quick", 3, [])):
        here = runs.read(f"{name}-seed0")
        everywhere = runs.seeds_anywhere(here)
        kinds = everywhere["kind"].tolist()
        assert kinds[:own] == [runs.kind_of(here)] * own and runs.kind_of(here) not in kinds[own:]
        on_gpu = sorted(run for run in runs.names() if run.startswith(f"{name}-gpu-seed"))
        assert everywhere["run"].tolist()[own:] == [*on_gpu, *elsewhere]
        assert set(kinds[own : own + len(on_gpu)]) == {"NVIDIA H100 80GB HBM3, bfloat16"}
    alone = runs.seeds_anywhere(runs.read("nine-blocks-seed0"))
    assert alone["run"].tolist() == ["nine-blocks-seed0"]


def test_the_readme_states_what_the_records_say() -> None:
    """Every result in the README beside the records is theirs, rounded."""
    readme = " ".join((data.ROOT / "notebooks/runs/README.md").read_text(encoding="utf-8").split())
    made = runs.by_cost()
    assert re.findall(r"\| `([\w-]+)` \| \d", readme) == made["run"].tolist()
    for row in made.itertuples():
        own = [run for run in runs.finished() if run.name.startswith(f"{row.run}-seed")]
        alike = runs.seeds_of(next(run for run in own if runs.kind_of(run) == row.kind))
        assert len(alike) == sum(runs.kind_of(run) == row.kind for run in own), row.run
        accuracy = mean_and_deviation(100 * alike["test_accuracy"], 2)
        minutes = mean_and_deviation(alike["train_seconds"] / 60, 1)
        assert f"| `{row.run}` | {row.n} | {accuracy} | {minutes} |" in readme, row.run
    for name in (
        "choice-early-deeper-slower",
        "choice-three-long-epochs",
    ):  # stopped while measuring
        history = pd.read_csv(runs.RUNS / name / "history.csv")
        last = 100 * history["validation_accuracy"].iloc[-1]
        assert re.search(rf"`{name}`[^`]*{last:.2f} %", readme), name


def test_settings_do_not_share_a_list() -> None:
    Settings().widths.append(1)
    assert Settings().widths[-1] != 1
