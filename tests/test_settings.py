"""Parameters: what is refused, in which words' place, and that nothing slips through."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import hypothesis
import nbformat
import pytest
import torch
from hypothesis import strategies as st

from helpers import project, settings
from helpers.settings import ParameterError, Settings, check_parameters, pick_precision

NAMES = [path.stem for path in project.PRESETS.glob("*.yaml")]
ROW = {"channels": 8, "kernels": [3, 1]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epoch": 3}, "epochs"),
        ({"epochs": 0}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"epochs": "3"}, "epochs"),
        ({"epochs": 3.0}, "epochs"),
        ({"epochs": 2}, "first_sizes"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": "1e-3"}, "1.0e-3"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"flip": "false"}, "-p flip False"),
        ({"first_sizes": "[8, 16]"}, "-y '{first_sizes: [8, 16]}'"),
        ({"first_sizes": "(16,)"}, "-y '{first_sizes: [16]}'"),
        ({"blocks": [{**ROW, 600 * "k": 1}]}, "kkk"),
        ({"run": 2026}, "-r run 2026"),
        ({"run": "a/b"}, "run"),
        ({"preset": ""}, "preset"),
        ({"gate": "softmx"}, "softmax"),
        ({"device": "cuda:0"}, "device"),
        ({"train_images": 50_000, "validation": 1}, "train_images"),
        ({"test_images": 4}, "at least 50"),
        ({"blocks": []}, "blocks"),
        ({"blocks": [{**ROW, "kernels": [2]}]}, "kernels"),
        ({"blocks": [{**ROW, "kernel": [3]}]}, "kernel"),
        ({"blocks": [{"channels": 8}]}, "kernels"),
        ({"blocks": [{**ROW, "residual": True}]}, "residual"),
        ({"blocks": [{**ROW, "pool": True}] * 6}, "16×16"),
    ],
)
def test_mistakes_are_refused_in_one_sentence_that_names_them(wrong: dict, said: str) -> None:
    with pytest.raises(ParameterError) as error:
        Settings(**wrong)
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert len(message) <= 240


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=9),
    st.lists(st.integers(0, 40), max_size=3),
)  # fmt: skip


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.dictionaries(st.sampled_from([*Settings.model_fields, "lr"]), VALUES))
def test_whatever_is_given_is_taken_whole_or_refused(given_values: dict[str, Any]) -> None:
    try:
        taken = Settings(**given_values)
    except ParameterError as error:
        assert len(str(error)) <= 240
    else:
        assert "lr" not in given_values
        assert Settings(**taken.model_dump()) == taken


GIVEN = {"preset": "small", "run": "", "seed": 1}
CELL = "seed = 1\nepochs = 5\n"


@pytest.mark.parametrize(
    "typo",
    [
        "epoch = 1", "epoch: int = 1", "epoch, other = 1, 2", "epochs = epoch = 7", "(epoch := 1)",
        "[epoch, *rest] = 1, 2", "epoch += 1", "%%time\nepoch = 1", "%load_ext nothing\nepoch = 1",
        "!ls\nepoch = 1", "if True:\n    epoch = 1", "for epoch in [1]:\n    pass",
        "with open('x') as epoch:\n    pass", "_epoch = 3",
        "epoch = 1; settings = check_parameters(globals())",
    ],
)  # fmt: skip
def test_an_unknown_name_is_refused_in_every_form_of_assignment(typo: str) -> None:
    check = "settings = check_parameters(globals())"
    variables = {"seed": 1, "epochs": 5, "epoch": 1, "_epoch": 3, "other": 2, "rest": []}
    for cells in (["", CELL + typo, check], ["", CELL, "# Parameters\n" + typo, check], [typo]):
        with pytest.raises(ParameterError, match=r"epoch|other|rest"):
            check_parameters(variables | {"In": cells})


def test_a_cell_that_is_no_python_is_refused() -> None:
    with pytest.raises(ParameterError, match="seed = = 1"):
        check_parameters({"seed": 1, "In": ["", "seed = = 1", "check_parameters(globals())"]})


def test_what_the_story_assigned_is_no_parameter_when_the_cell_is_run_again() -> None:
    check = "settings = check_parameters(globals())\nimages = 1"
    kernel = GIVEN | {"epochs": 5, "In": ["", "import sys", CELL, check]}
    check_parameters(kernel)
    kernel |= {"loss": 3, "images": 1}
    kernel["In"] += ["loss = 3", "%%bash\nls", CELL, check]
    assert check_parameters(kernel).epochs == 5
    kernel["In"] += [check]  # alone, once more
    assert check_parameters(kernel).epochs == 5
    kernel |= {"epoch": 9}
    for cells in ([CELL + "epoch = 9", check], [check]):  # run again, it is refused again
        kernel["In"] += cells
        with pytest.raises(ParameterError, match="epoch "):
            check_parameters(kernel)
    kernel["In"] += [CELL, check]  # corrected, though the kernel still knows it
    assert check_parameters(kernel).epochs == 5


def test_before_the_first_success_a_mistake_counts_until_it_is_corrected() -> None:
    check = "check_parameters(globals())"
    kernel = GIVEN | {"epoch": 9, "In": ["", "epoch: int = 9", check]}
    for _ in range(2):
        with pytest.raises(ParameterError, match="epoch "):
            check_parameters(kernel)
        kernel["In"] += [check]
    kernel["In"] += ["seed = = 3", "seed = 3", check]  # the first of these was never run
    assert check_parameters(kernel).seed == 1


def test_a_parameters_cell_without_a_preset_is_refused() -> None:
    with pytest.raises(ParameterError, match="preset is not set"):
        check_parameters({"run": "", "seed": 1, "In": ["", "run = ''\nseed = 1"]})


def test_a_parameter_that_a_notebook_does_not_take_is_refused() -> None:
    cells = ["", "run = ''", "# Parameters\nepochs = 3", "check_parameters(globals(), ['run'])"]
    with pytest.raises(ParameterError, match="epochs is not one of this notebook"):
        check_parameters({"run": "", "epochs": 3, "In": cells}, ["run"])


def test_presets_are_what_they_say_and_small_is_the_default() -> None:
    assert {"smoke", "small", "medium", "large"} <= set(NAMES)
    for name in NAMES:
        assert Settings(**settings.read_preset(name)).preset == name
    assert Settings(**settings.read_preset("small")) == Settings()


@pytest.mark.parametrize(
    "text",
    [
        "epochs: [", "- 1", "epochs: 0", "preset: other", "seed: 0x10", "seed: 012", "seed: 1:30",
        "epochs: 1_0", "seed: 1\nseed: 2", "blocks: [{channels: 8, channels: 9}]",
    ],
)  # fmt: skip
def test_a_damaged_preset_is_refused(text: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "PRESETS", tmp_path)
    (tmp_path / "mine.yaml").write_text(f"preset: mine\n{text}\n", encoding="utf-8")
    with pytest.raises(ParameterError, match=r"mine\.yaml"):
        settings.read_preset("mine")
    with pytest.raises(ParameterError, match=r"mine\.yaml"):  # papermill read it more leniently
        check_parameters(GIVEN | {"preset": "mine", "In": ["", "preset = 'mine'"]})
    with pytest.raises(ParameterError, match="mine"):
        settings.read_preset("mime")


def test_the_training_notebook_declares_every_parameter_with_the_default() -> None:
    notebook = nbformat.read(project.ROOT / "notebooks" / "03_training.ipynb", as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    declared: dict[str, Any] = {}
    exec(cell.source, declared)
    assert {name for name in declared if name != "__builtins__"} == set(Settings.model_fields)
    declared.pop("__builtins__")
    assert Settings(**declared) == Settings()


@pytest.mark.parametrize(("bfloat16", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_takes_float16(
    bfloat16: bool, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    assert pick_precision("auto", torch.device("cuda")) == chosen


def test_a_gpu_that_does_not_work_is_replaced_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and is none
    assert settings.pick_device("auto").type == "cpu"
    assert "cuda" in capsys.readouterr().out
    with pytest.raises(ParameterError, match="cuda"):
        settings.pick_device("cuda")


@pytest.mark.parametrize("cell", ["%%time\nepoch = 6", "%time epoch = 6", "%%capture\nepoch = 6"])
def test_in_a_kernel_magics_are_read_as_they_were_written(cell: str) -> None:
    code = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in ("from helpers.settings import *", {cell!r}, "check_parameters(globals())"):
    done = shell.run_cell(cell, store_history=True)
print(done.error_in_exec)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.ROOT, capture_output=True, text=True
    )
    assert "Parameter epoch is not known" in done.stdout, done.stderr
