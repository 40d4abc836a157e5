"""The parameters of a run, checked: in a notebook's cell, injected by papermill, or in a preset."""

from __future__ import annotations

import ast
import re
import symtable
import timeit
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import yaml
from IPython import get_ipython
from IPython.core.inputtransformer2 import TransformerManager
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.data import IMAGE_SIZE, TEST_IMAGES, TRAINING_IMAGES
from helpers.model import BlockNetwork
from helpers.project import PRESETS, ProjectError, did_you_mean, short

CHECK = "check_parameters("  # what is before it in a cell is read
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
Gate = Literal["linear", "softmax", "sigmoid", "constant", "uniform"]
Size = Annotated[int, Field(ge=8, lt=IMAGE_SIZE)]
Pixels = Annotated[int, Field(ge=0, lt=IMAGE_SIZE)]
Rate = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ParameterError(ProjectError):
    """A parameter that cannot be used; the message names it, its value and what is allowed."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Checked(Strict):
    def __init__(self, **given: Any) -> None:
        """Raises a ParameterError for the first value that cannot be used."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ParameterError(first_fault(error, type(self).model_fields)) from None


class Block(Strict):
    """A row of `Settings.blocks`: one intermediate block, and what follows it."""

    channels: int = Field(ge=1, le=4096)
    kernels: list[Pixels] = Field(max_length=64, strict=False)
    stride: int = Field(1, ge=1, le=4)
    pool: bool = False
    residual: bool = False
    gate: Gate | None = None


def six_blocks(kernels: list[int], widths: list[int]) -> list[Block]:
    """The blocks of small and medium networks: two of each width, the first with pooling."""
    return [Block(channels=c, kernels=kernels, pool=p) for c in widths for p in (True, False)]


class Settings(Checked):
    """Every parameter of a run, as the preset `small` has it; notebook 03 says what each is."""

    preset: str = Field("small", pattern=f"^{NAME}$")
    seed: int = Field(0, ge=0, lt=2**32)
    run: str = Field("", pattern=f"^({NAME})?$")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    validation: int = Field(0, ge=0, le=TRAINING_IMAGES - 1000)
    train_images: int = Field(0, ge=0, le=TRAINING_IMAGES)
    test_images: int = Field(0, ge=0, le=TEST_IMAGES)

    blocks: list[Block] = Field(six_blocks([3, 1], [32, 128, 128]), strict=False)
    gate: Gate = "linear"
    stem_filters: int = 24
    normalise: bool = True
    activation: Literal["none", "relu", "gelu", "silu"] = "silu"

    epochs: int = Field(8, ge=1, le=10_000)
    first_sizes: list[Size] = Field([16, 16, 16], strict=False)
    batch_size: int = Field(250, ge=2, le=TRAINING_IMAGES)
    learning_rate: Rate = 0.07
    momentum: Share = 0.85
    adam_learning_rate: Rate = 0.014
    gate_learning_rate: Rate = 0.0003
    label_smoothing: Share = 0.1

    translate: Pixels = 2
    flip: bool = True
    cutout: Pixels = 0
    skip_easy: Share = 0.5

    def __init__(self, **given: Any) -> None:
        """Raises a ParameterError, also for values that do not go together."""
        super().__init__(**given)
        size, fault = min([IMAGE_SIZE, *self.first_sizes]), ""
        if self.train_images + self.validation > TRAINING_IMAGES:
            fault = f"train_images and validation: there are {TRAINING_IMAGES} images in all"
        elif 0 < self.train_images < 50 or 0 < self.test_images < 50:
            fault = "train_images and test_images: use at least 50, or 0 for all"
        elif len(self.first_sizes) >= self.epochs:
            fault = "first_sizes: there must be fewer than epochs; the last epoch is at 32 pixels"
        try:
            with torch.device("meta"):  # shapes only: known before any image is read
                self.network().eval()(torch.zeros(2, 3, size, size))
        except ValueError as error:  # it says which parameter is not allowed
            fault = str(error).rstrip(".")
        except RuntimeError:
            fault = f"blocks: {size}×{size} images shrink to nothing; pool fewer blocks"
        if fault:
            raise ParameterError(f"Parameter {fault}.")

    @property
    def run_name(self) -> str:
        return self.run or f"{self.preset}-seed{self.seed}"

    def image_size(self, epoch: int) -> int:
        """Height and width in pixels of the training images in an epoch, counted from 1."""
        return (self.first_sizes + [IMAGE_SIZE] * epoch)[epoch - 1]

    def network(self) -> BlockNetwork:
        """The network of these parameters, freshly initialised."""
        rows = [block.model_dump() for block in self.blocks]
        return BlockNetwork(rows, self.gate, self.stem_filters, self.normalise, self.activation)


def first_fault(error: ValidationError, known: Iterable[str]) -> str:
    """The first of pydantic's findings as one sentence, with how papermill takes such a value."""
    fault = error.errors()[0]
    (name, *inside), value = fault["loc"], fault["input"]
    if fault["type"] == "extra_forbidden" and not inside:
        return f"Parameter {name:.60} is not known: {did_you_mean(name, known)}."
    where = "".join(f"[{part!r:.40}]" for part in inside)
    what = fault["msg"].replace("Input should", "it should")
    if fault["type"] == "string_pattern_mismatch":
        what = "use at most 100 letters, digits, '.', '_' and '-'"
    text = f"{value}".strip("()[], ").lower()
    boolean = "False" if text in ("false", "no", "off", "0") else "True"
    plain = re.fullmatch(r"[\d, ]{1,40}", text)
    remedies = {
        "bool_type": f"papermill: -p {name} {boolean}",
        "list_type": f"papermill: -y '{{{name}: [{text if plain else '…'}]}}'",
        "string_type": f"papermill: -r {name} {value!s:.30}",
        "float_type": "in YAML, write a decimal point: 1.0e-3",
    }
    remedy = f" ({remedies[fault['type']]})" if not inside and fault["type"] in remedies else ""
    return f"Parameter {name}{where} = {value!r:.60}: {what}{remedy}."


def check_parameters(
    namespace: dict[str, Any], takes: Sequence[str] = tuple(Settings.model_fields)
) -> Settings:
    """The settings of a notebook, from its `globals()`, right after its parameters cell.

    papermill only warns about a name that a notebook does not know, and runs on the defaults. So
    every name assigned since the last check must be a parameter. After a check that succeeded, only
    cells that assign a parameter count, since the story's own cells follow. A notebook that `takes`
    but a few refuses the others, and none does without `preset` and `run`. A preset is read again,
    since papermill's -f is more lenient.
    """
    known, cells, shell = Settings.model_fields.keys(), namespace.get("In", []), get_ipython()
    if shell is not None and namespace is shell.user_ns:
        cells = shell.history_manager.input_hist_raw  # with magics as they were written
    begin, end, succeeded = namespace.get("_checked", (0, 0, False))
    last = max((k for k, cell in enumerate(cells) if CHECK not in cell), default=0)
    begin = end if last >= end else begin
    namespace["_checked"] = begin, len(cells), succeeded
    given = set(takes)
    for k, cell in enumerate(cells[begin:], begin):
        names = assigned(cell, is_last=k >= last)
        if not succeeded or names & known:
            given |= names - {"_", "__"}
    given &= namespace.keys()
    if foreign := given & known - set(takes):
        names = ", ".join(takes)
        raise ParameterError(f"Parameter {min(foreign)} is not one of this notebook: {names}.")
    settings = Settings(**{name: namespace[name] for name in sorted(given)})
    if missing := {"preset", "run"} & set(takes) - given:
        raise ParameterError(f"Parameter {min(missing)} is not set; run the parameters cell.")
    if settings.preset in {path.stem for path in PRESETS.glob("*.yaml")}:
        read_preset(settings.preset)
    pick_precision(settings.precision, pick_device(settings.device))  # can this machine do it?
    namespace["_checked"] = begin, len(cells), True
    return settings


def assigned(cell: str, is_last: bool = True) -> set[str]:
    """The names that a cell assigns, in whatever form, before any check. One that is no Python
    assigned nothing, and is refused only if it is the last one."""
    body = re.sub(r"\A(\s*%%.*\n?)+", "", re.sub(r"(?m)^\s*%(time|timeit|prun)\s", "", cell))
    try:
        statements = ast.parse(TransformerManager().transform_cell(body)).body
        before = takewhile(lambda text: CHECK not in text, map(ast.unparse, statements))
        symbols = symtable.symtable("\n".join(before), "cell", "exec").get_symbols()
    except SyntaxError:
        if body != cell or not is_last:  # a cell magic in another language, such as %%bash
            return set()
        raise ParameterError(
            f"The cell that begins {cell.strip()[:40]!r} is not valid Python; correct it."
        ) from None
    return {one.get_name() for one in symbols if one.is_assigned() and not one.is_namespace()}


class PlainYaml(yaml.SafeLoader):
    """Strict YAML, which refuses ambiguous numbers (012 would be ten, 1:30 ninety) and a name that
    is given twice."""

    def construct_number(self, node: yaml.ScalarNode) -> float:
        if re.match(r"[-+]?0[0-9box_]|.*[:_]", node.value):
            raise yaml.YAMLError(f"write {node.value!r:.40} in plain decimal digits")
        return yaml.SafeLoader.yaml_constructors[node.tag](self, node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := {name for name in names if names.count(name) > 1}:
            raise yaml.YAMLError(f"{min(twice)!r:.40} is given twice")
        return super().construct_mapping(node, deep)


for kind in ("int", "float"):
    PlainYaml.add_constructor(f"tag:yaml.org,2002:{kind}", PlainYaml.construct_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file says; a ParameterError if it cannot be read, or means something else."""
    try:
        return dict(yaml.load(path.read_text(encoding="utf-8"), PlainYaml))
    except (yaml.YAMLError, OSError, ValueError, TypeError, RecursionError) as error:
        why = getattr(error, "problem", None) or error
        raise ParameterError(f"{short(path)} is not valid YAML ({why!s:.80}).") from None


def read_preset(name: str) -> dict[str, Any]:
    """The parameters that a preset gives: those in which it differs from the defaults."""
    path, known = PRESETS / f"{name}.yaml", [path.stem for path in PRESETS.glob("*.yaml")]
    if name not in known:
        raise ParameterError(f"There is no preset {name!r:.60}: {did_you_mean(name, known)}.")
    parameters = read_yaml(path)
    try:
        Settings(**parameters)
    except (ParameterError, TypeError) as error:
        fault = re.sub(r" \(papermill: .*\)", "", str(error))
        raise ParameterError(f"{short(path)}: {fault}") from None
    if parameters.get("preset") != name:
        raise ParameterError(f"{short(path)} must contain preset: {name}.")
    return parameters


def pick_device(name: str) -> torch.device:
    """The device of a name; `"auto"` is a GPU on which a convolution works, or else the CPU."""
    gpus = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for candidate in [*gpus, "cpu"] if name == "auto" else [name]:
        try:
            x = torch.zeros(1, 3, 8, 8, device=candidate)
            F.conv2d(x, x).sum().item()
            return torch.device(candidate)
        except Exception as error:  # whatever a driver raises
            why = f"{candidate} does not work here ({' '.join(str(error).split())[:80]})"
            if name == "auto":
                print(f"Device {why}; trying another.")
    raise ParameterError(f"Parameter device = {name!r}: {why}; use auto or cpu.")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of feature maps in training; `"auto"`: bfloat16 where the device has it and is
    quicker with it, else float16 on CUDA, else float32. What would be emulated, hundreds of times
    slower, is refused."""
    able = ["float32"]
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        able = ["bfloat16"] * has_bfloat16 + ["float16", "float32"]
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if has.get("avx512_bf16") or has.get("amx_bf16"):
            able = ["bfloat16", "float32"] if is_bfloat16_faster() else ["float32", "bfloat16"]
    chosen = able[0] if name == "auto" else name
    if chosen not in able:
        allowed = ", ".join(["auto", *able])
        raise ParameterError(
            f"Parameter precision = {name!r}: on this {device.type}, use {allowed}."
        )
    return getattr(torch, chosen)


@cache
def is_bfloat16_faster() -> bool:
    """Measured with a small convolution: of CPUs with bfloat16 instructions some take half the time
    of float32, others 1.5 times as long."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(64, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
        kernel = torch.ones(64, 64, 3, 3, dtype=dtype)
        seconds.append(min(timeit.repeat(partial(F.conv2d, x, kernel), number=1, repeat=7)))
    return seconds[0] < seconds[1]
