"""The parameters of a run, checked: in a notebook's cell, injected by papermill, or in a preset."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal

import torch
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from helpers.data import IMAGE_SIZE, TRAINING_IMAGES
from helpers.model import BlockNetwork
from helpers.project import PRESETS, ProjectError, nearest, shown

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Gate = Literal["linear", "softmax", "sigmoid", "constant", "uniform"]
Images = Annotated[int, Field(ge=0, le=TRAINING_IMAGES)]
Pixels = Annotated[int, Field(ge=0, lt=IMAGE_SIZE)]
Size = Annotated[int, Field(ge=8, le=IMAGE_SIZE)]
Kernel = Annotated[int, Field(ge=1, lt=IMAGE_SIZE)]
Rate = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ParameterError(ProjectError):
    """A parameter that cannot be used; the message names it, its value and what is allowed."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Block(Strict):
    """A row of `Settings.blocks`: one intermediate block, and what follows it."""

    channels: int = Field(ge=1, le=4096)
    kernels: list[Kernel] = Field(min_length=1, max_length=64, strict=False)
    stride: int = Field(1, ge=1, le=4)
    pool: bool = False
    residual: bool = False
    gate: Gate | None = None


SMALL = [
    Block(channels=channels, kernels=[3, 1], pool=pool)
    for channels in (32, 128, 128)
    for pool in (True, False)
]


class Settings(Strict):
    """Every parameter of a run; the defaults are the preset `small`'s. The parameters cell of
    notebook 03 says what each is."""

    preset: str = Field("small", pattern=f"^{NAME}$")
    seed: int = Field(0, ge=0, lt=2**32)
    run: str = Field("", pattern=f"^({NAME})?$")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    validation: Images = 0
    train_images: Images = 0
    test_images: Images = 0

    blocks: list[Block] = Field(SMALL, min_length=1, strict=False)
    gate: Gate = "linear"
    stem_filters: int = Field(24, ge=0, le=54)
    normalise: bool = True
    activation: Literal["none", "relu", "gelu", "silu"] = "silu"

    epochs: int = Field(6, ge=1, le=10_000)
    first_sizes: list[Size] = Field([16, 16], strict=False)
    batch_size: int = Field(250, ge=2, le=TRAINING_IMAGES)
    learning_rate: Rate = 0.07
    momentum: Share = 0.85
    adam_learning_rate: Rate = 0.014
    gate_learning_rate: Rate = 0.0003
    label_smoothing: Share = 0.1

    translate: Pixels = 2
    flip: bool = True
    cutout: Pixels = 0
    trivial_augment: float = Field(0.0, ge=0, le=1)
    skip_easy: Share = 0.0

    def __init__(self, **given: Any) -> None:
        """Raises a ParameterError for the first value that cannot be used."""
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ParameterError(first_fault(error)) from None
        size, fault = min([IMAGE_SIZE, *self.first_sizes]), ""
        if self.train_images + self.validation > TRAINING_IMAGES or self.validation > 49_000:
            fault = f"train_images and validation: there are {TRAINING_IMAGES} images in all"
        elif len(self.first_sizes) >= self.epochs:
            fault = "first_sizes: there must be fewer than epochs; the last epoch is at 32 pixels"
        try:
            with torch.device("meta"):  # shapes only: known before any image is read
                self.network().eval()(torch.zeros(2, 3, size, size))
        except ValueError as error:
            fault = f"blocks: {error}".rstrip(".")
        except RuntimeError:
            fault = f"blocks: nothing is left of images of {size}×{size} pixels; pool fewer blocks"
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


def first_fault(error: ValidationError) -> str:
    """The first of pydantic's findings as one sentence, with how papermill takes such a value."""
    fault = error.errors()[0]
    name, *inside = fault["loc"]
    value, hint = fault["input"], ""
    if fault["type"] == "extra_forbidden" and not inside:
        return f"Parameter {name} is not known: {nearest(name, Settings.model_fields)}."
    if isinstance(value, str):  # what papermill's -p makes of other than numbers
        if value.lower() in ("true", "false"):
            hint = f" (papermill: -p {name} {value.title()})"
        elif value.startswith(("[", "{", "(")):
            hint = f" (papermill: -y '{{{name}: {value}}}')"
        elif re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value):
            hint = f" (in YAML with a point: {float(value):.1e})"
    elif fault["type"] == "string_type":
        hint = f" (papermill: -r {name} {value})"
    what = fault["msg"].replace("Input should", "it should")
    if fault["type"] == "missing":
        value, what = "nothing", "it has to be given"
    if fault["type"] == "string_pattern_mismatch":
        what = "it should be a name of letters, digits, '.', '_' and '-'"
    where = "".join(f"[{part!r}]" for part in inside)
    return f"Parameter {name}{where} = {value!r:.60}: {what}{hint}."


def check_parameters(
    namespace: dict[str, Any], takes: Sequence[str] = tuple(Settings.model_fields)
) -> Settings:
    """The settings of a notebook, from its variables, right after its parameters cell.

    papermill only warns of a name that a notebook does not know, and runs on the defaults; so the
    cells that were run are read, and what they assign has to be a parameter: all cells at the first
    check; later, among the story's own, those that assign a parameter or come just before.

    Args:
        namespace: the notebook's `globals()`.
        takes: the parameters that the notebook takes, if not all.

    Raises:
        ParameterError: naming the parameter, its value and what is allowed.
    """
    cells = namespace.get("In", [])
    checks = [k for k, cell in enumerate(cells) if CHECK in cell]
    begin = checks[-2] if len(checks) > 1 else 0
    given = [name for name in takes if name in namespace]
    for k, cell in enumerate(cells[begin:], begin):
        names = assigned(cell)
        if begin == 0 or k >= len(cells) - 2 or set(names) & set(Settings.model_fields):
            given += [name for name in names if name in namespace and not name.startswith("_")]
    for name in given:
        if name in Settings.model_fields and name not in takes:
            raise ParameterError(
                f"Parameter {name} is not one of this notebook, which takes {', '.join(takes)}."
            )
    settings = Settings(**{name: namespace[name] for name in given})
    pick_precision(settings.precision, pick_device(settings.device))  # can this machine do it?
    return settings


CHECK = "check_parameters("
RUN_HERE = ("%%time", "%%capture", "%%prun")  # cell magics whose body assigns in the notebook


def assigned(cell: str) -> list[str]:
    """The names that a cell assigns at its top level, in whatever form, before any check.

    Raises:
        ParameterError: it cannot be read as Python, with IPython's commands or without.
    """
    lines = cell.splitlines()
    if lines and lines[0].startswith("%%"):
        lines = lines[1:] if lines[0].startswith(RUN_HERE) else []
    try:
        statements = ast.parse(TransformerManager().transform_cell("\n".join(lines))).body
    except SyntaxError:
        raise ParameterError(
            f"The cell that begins {cell.strip()[:40]!r} cannot be read as Python, so its "
            "parameters cannot be checked; write plain assignments, one a line."
        ) from None
    names, nodes = [], [*takewhile(lambda one: CHECK not in ast.unparse(one), statements)]
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        scopes = ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.ListComp | ast.GeneratorExp
        if not isinstance(node, scopes | ast.DictComp | ast.SetComp):  # with names of their own
            nodes.extend(ast.iter_child_nodes(node))
    return names


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """The parameters that a preset gives: those in which it differs from the defaults.

    Raises:
        ParameterError: there is no such preset, or a parameter in it cannot be used.
    """
    if name not in preset_names():
        raise ParameterError(f"There is no preset {name!r}: {nearest(name, preset_names())}.")
    path = PRESETS / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
        parameters = yaml.safe_load(text)
        Settings(**parameters)
        if octal := re.search(r"^.*: 0\d.*$", text, re.MULTILINE):
            raise ParameterError(f"{octal[0]}: write numbers without a leading zero.")
    except (yaml.YAMLError, UnicodeDecodeError, TypeError):
        raise ParameterError(f"{shown(path)} is no YAML of lines like epochs: 6.") from None
    except ParameterError as error:
        raise ParameterError(f"{shown(path)}: {error}") from None
    if parameters.get("preset") != name:
        raise ParameterError(f"{shown(path)} must say preset: {name}.")
    return parameters


def pick_device(name: str) -> torch.device:
    """The device of a name; `"auto"` is a GPU on which a convolution works, or else the CPU.

    Raises:
        ParameterError: this machine does not have it, or it does not work.
    """
    gpus = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for candidate in [*gpus, "cpu"] if name == "auto" else [name]:
        try:
            device = torch.device(candidate)
            x = torch.zeros(1, 3, 8, 8, device=device)
            torch.nn.functional.conv2d(x, x).sum().item()
            return device
        except (RuntimeError, AssertionError) as error:
            why = f"{candidate} does not work here ({str(error).splitlines()[0][:80]})"
            if name == "auto":
                print(f"Device {why}; another one is used.")
    raise ParameterError(f"Parameter device = {name!r}: {why}; use auto or cpu.")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of feature maps while training. `"auto"` is bfloat16 where the device has it,
    float16 on other CUDA GPUs, else float32.

    Raises:
        ParameterError: a dtype that the device would emulate, up to hundreds of times slower.
    """
    able = ["float32"]
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        able = ["bfloat16"] * has_bfloat16 + ["float16", "float32"]
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        able = ["bfloat16"] * (has.get("avx512_bf16") or has.get("amx_bf16") or False) + able
    chosen = able[0] if name == "auto" else name
    if chosen not in able:
        raise ParameterError(
            f"Parameter precision = {name!r}: this {device.type} has no instructions for it; "
            f"use auto or {' or '.join(able)}."
        )
    return getattr(torch, chosen)
