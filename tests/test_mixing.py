"""The compiled form is the formula, is chosen where it pays, and can be done without."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers import bench, data, mixing, model, runs
from helpers.model import IntermediateBlock

here = pytest.mark.skipif(bool(mixing.missing()), reason=mixing.missing() or "it is here")
# What takes the place of the compiler where none is needed.
ANY_PROGRAM = sys.executable
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-2}  # of the largest number of each tensor


def test_it_is_there_where_nothing_is_missing():
    """Else all that follows would be left out, and a program that is broken pass."""
    compiler, *options = shlex.split(os.environ.get("CXX") or "g++")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or shutil.which(compiler) is None:
        pytest.skip("no g++, or no AVX-512")
    version = subprocess.check_output([compiler, *options, "-dumpversion"], text=True)
    if int(version.split(".")[0]) < 12:
        pytest.skip(f"{compiler} is of version {version.strip()}, before 12")
    assert mixing.missing() == ""


def test_both_languages_take_as_many_images_together():
    stated = f"constexpr Size MIXED = {mixing.MIXED}, LED_BACK = {mixing.LED_BACK};"
    assert stated in mixing.SOURCE.read_text(encoding="utf-8")


def there_and_back(block, x):
    """x′ and the gradients of x, every branch, and fc, for one fixed gradient of x′."""
    x = x.detach().requires_grad_()
    x_new = block(x)
    weights = torch.linspace(-1, 2, x_new.numel()).view(x_new.shape).to(x_new.dtype)
    (x_new * weights).sum().backward()
    return {
        "x′": x_new.detach(), "x": x.grad, **{n: p.grad for n, p in block.named_parameters()}
    }  # fmt: skip


def pair_of_blocks(c, out, L, kernel_size, gate="softmax"):
    """The same random block, as written in float64, and compiled in float32."""
    torch.manual_seed(L)
    exact = IntermediateBlock(c, out, L, kernel_size, gate=gate, form="branches").double()
    for parameter in exact.parameters():
        nn.init.normal_(parameter)
    compiled = IntermediateBlock(c, out, L, kernel_size, gate=gate, form="compiled")
    compiled.load_state_dict(exact.state_dict())
    return exact, compiled


@here
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [(8, 16), (24, 40), (64, 72)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (9, 13), (3, 34)], ids=str)
@pytest.mark.parametrize(
    ("L", "kernel_size"), [(1, 3), (2, (3, 1)), (3, (5, 3, 1)), (5, 3), (8, 3), (2, 7), (4, 1)]
)
def test_compiled_blocks_equal_the_formula(L, kernel_size, size, channels, memory_format):
    gate = "linear" if L == 3 else "softmax"
    exact, compiled = pair_of_blocks(*channels, L, kernel_size, gate)
    x = torch.randn(11, channels[0], *size).contiguous(memory_format=memory_format)
    expected, measured = there_and_back(exact, x.double()), there_and_back(compiled, x)
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        assert (measured[name] - value).abs().max() < TOLERANCE[torch.float32] * scale, name


@here
@pytest.mark.skipif(not mixing.fits(torch.bfloat16), reason="no bfloat16 numbers here")
@pytest.mark.parametrize("size", [(3, 2), (5, 7), (16, 16), (2, 33)], ids=str)
@pytest.mark.parametrize(("L", "kernel_size"), [(1, 3), (2, (3, 1)), (5, 3)])
def test_they_do_so_under_autocast_to_fewer_digits(L, kernel_size, size):
    exact, compiled = pair_of_blocks(24, 16, L, kernel_size)
    x = torch.randn(9, 24, *size)
    expected = there_and_back(exact, x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = there_and_back(compiled, x)
    for name in expected.keys() - {"fc.weight", "fc.bias"}:  # sums of what nearly cancels
        scale = expected[name].abs().max()
        assert (measured[name] - expected[name]).abs().max() < 0.05 * scale, name


@here
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_of_a_and_of_kernels_are_those_of_pytorch(dtype):
    """In which fc has no part, so that a's gradient is held to as many digits as the others."""
    if not mixing.fits(dtype):
        pytest.skip(f"no {dtype} numbers here")
    torch.manual_seed(0)
    shapes = (19, 40, 7, 6), (19, 5), (5, 24, 40, 3, 3), (19, 24, 7, 6)
    numbers = [torch.randn(shape).to(dtype) for shape in shapes]
    assert mixing._error(*numbers) < TOLERANCE[dtype]


@here
def test_what_is_computed_does_not_depend_on_chance():
    """And on the number of threads only in the last digits of the gradients of kernels."""
    torch.manual_seed(0)
    x, a, grad = torch.randn(21, 64, 8, 8), torch.rand(21, 3), torch.randn(21, 64, 8, 8)
    kernels, threads, results = torch.randn(3, 64, 64, 3, 3), torch.get_num_threads(), []
    try:
        for torch_threads in (1, 2, 2, 3):
            torch.set_num_threads(torch_threads)
            gradients = mixing.gradients(x, grad, a, kernels)
            results.append([mixing.convolved(x, a, kernels), *gradients])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, same) for one, same in zip(results[1], results[2], strict=True))
    for one, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@here
@pytest.mark.parametrize("other", [torch.ones(8, 8, 1, 1), torch.ones(8, 8, 3, 3).double()])
def test_kernels_that_differ_are_refused(other):
    """Else the program would read beyond the smaller one, or take its bits for other numbers."""
    x, a, kernels = torch.ones(2, 8, 4, 4), torch.ones(2, 2), [torch.ones(8, 8, 3, 3), other]
    for call in (mixing.convolved, mixing.led_back, lambda *rest: mixing.gradients(x, *rest)):
        with pytest.raises(mixing.Unavailable, match="one shape and one number type"):
            call(x, a, kernels)


@here
def test_of_no_images_nothing_is_learnt():
    _, block = pair_of_blocks(16, 24, 3, 3)
    assert block(torch.empty(0, 16, 4, 4, requires_grad=True)).shape == (0, 24, 4, 4)
    block(torch.empty(0, 16, 4, 4, requires_grad=True)).sum().backward()
    assert all(not branch.weight.grad.any() for branch in block.branches)


@here
def test_an_image_is_the_same_alone_and_in_a_batch():
    torch.manual_seed(0)
    x, a, kernels = torch.randn(7, 16, 6, 6), torch.rand(7, 3), torch.randn(3, 24, 16, 3, 3)
    alone = [mixing.convolved(x[i : i + 1], a[i : i + 1], kernels) for i in range(len(x))]
    assert torch.equal(mixing.convolved(x, a, kernels), torch.cat(alone))


@here
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [(64, 64, 32, 3), (72, 136, 5, 5), (8, 8, 7, 7), (128, 8, 6, 1)])
def test_many_channels_and_several_rounds_of_images_make_no_difference(case, dtype):
    """One thread lays out the images of large maps some at a time, in the same memory."""
    if not mixing.fits(dtype):
        pytest.skip(f"no {dtype} numbers here")
    (c, out, size, k), threads = case, torch.get_num_threads()
    torch.manual_seed(0)
    shapes = (19, c, size, size), (19, 3), (3, out, c, k, k), (19, out, size, size)
    torch.set_num_threads(1)
    try:
        error = mixing._error(*(torch.randn(shape).to(dtype) for shape in shapes))
    finally:
        torch.set_num_threads(threads)
    assert error < TOLERANCE[dtype]


@here
@pytest.mark.skipif(not mixing.fits(torch.bfloat16), reason="no bfloat16 numbers here")
def test_gradients_of_kernels_are_not_rounded_and_lie_as_the_kernels_do():
    """Under autocast too, so that the optimiser has all their digits."""
    _, block = pair_of_blocks(16, 24, 2, (3, 1))
    block = block.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(torch.randn(9, 16, 4, 4)).float().square().sum().backward()
    for branch in block.branches:
        grad = branch.weight.grad
        assert grad.dtype == torch.float32 and grad.stride() == branch.weight.stride()
        assert not torch.equal(grad, grad.bfloat16().float())


@here
def test_only_the_gradients_that_are_needed_are_computed(monkeypatch):
    """The first block of a network needs none of its x, which is a convolution less."""
    calls, led_back = [], mixing.led_back
    monkeypatch.setattr(mixing, "led_back", lambda *a: calls.append(1) or led_back(*a))
    _, block = pair_of_blocks(8, 8, 2, 3)
    block(torch.randn(2, 8, 4, 4)).sum().backward()
    assert not calls
    block(torch.randn(2, 8, 4, 4, requires_grad=True)).sum().backward()
    assert len(calls) == 1


@here
def test_nothing_is_kept_but_x_and_no_second_derivative_given():
    _, block = pair_of_blocks(16, 16, 4, 3)
    x, saved = torch.randn(64, 16, 8, 8, requires_grad=True), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x_new = block(x)
    kernels = 4 * block.branches[0].weight.numel() * 4
    assert sum(saved.values()) < 4 * x.numel() + 2 * kernels + 40_000
    (gradient,) = torch.autograd.grad((x_new**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# ---- where it is taken


def parts_of(size, kernel_size, stride=1, channels=(128, 128)):
    with torch.device("meta"):
        block = IntermediateBlock(*channels, len(kernel_size), kernel_size, stride)
    return block.parts(torch.empty(1, channels[0], size, size))


@pytest.fixture
def avx512(monkeypatch):
    """Forms are chosen as with AVX-512 and a compiler, whatever is here."""
    monkeypatch.setattr(model, "instructions", lambda: "AVX512")
    monkeypatch.setattr(mixing, "missing", lambda: "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.parametrize("half", [False, True])
def test_auto_mixes_in_the_cache_where_that_costs_less_than_the_branches(half, avx512):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        for size, kernel_size, taken in [
            (32, (3,), False), (32, (3, 1), True), (8, (3, 1), True), (7, (3, 1), False),
            (6, (3, 1, 1), True), (6, (5, 3), True), (4, (5, 3), False), (4, (3, 3), True),
            (2, (3, 3), False), (2, (3,) * 3, True),
        ]:  # fmt: skip
            everyone = [("compiled", list(range(len(kernel_size))))]
            assert (parts_of(size, kernel_size) == everyone) == taken, (size, kernel_size)


def test_auto_mixes_later_where_mixed_kernels_of_many_channels_leave_the_cache(avx512):
    for size, kernel_size, taken in [
        (6, (5, 3), False), (12, (5, 3), True), (3, (3, 3), False), (6, (3, 3, 3), True)
    ]:  # fmt: skip
        everyone = [("compiled", list(range(len(kernel_size))))]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # in float32 Winograd's tiles come first
            assert (parts_of(size, kernel_size, channels=(384, 384)) == everyone) == taken, size
            assert parts_of(size, kernel_size, channels=(192, 192)) == everyone, size


def test_auto_takes_winograd_instead_for_few_branches_of_very_many_channels(avx512):
    assert parts_of(8, (3, 3), channels=(384, 384)) == [("winograd", [0, 1])]
    assert parts_of(8, (3, 3), channels=(256, 256)) == [("compiled", [0, 1])]
    assert parts_of(8, (3, 3, 3), channels=(384, 384)) == [("compiled", [0, 1, 2])]


@pytest.mark.parametrize("half", [False, True])
def test_auto_does_without_it_where_it_cannot_be_had(half, avx512, monkeypatch):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        assert parts_of(16, (3, 3), stride=2) != [("compiled", [0, 1])]
        assert parts_of(16, (3, 3), channels=(128, 124)) != [("compiled", [0, 1])]
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        assert (parts_of(16, (3, 3)) == [("compiled", [0, 1])]) == (not half)
        monkeypatch.setattr(mixing, "missing", lambda: "There is no C++ compiler.")
        assert parts_of(16, (3, 3)) != [("compiled", [0, 1])]


def test_auto_does_without_it_for_numbers_of_another_type(avx512):
    block, x = IntermediateBlock(16, 16, 4).double(), torch.randn(2, 16, 16, 16).double()
    assert block.parts(x) == [("grouped", [0, 1, 2, 3])]
    assert block(x).dtype == torch.float64


@here
def test_its_multiply_adds_are_those_of_mixed_kernels():
    block = IntermediateBlock(8, 16, 2, [3, 1], gate="uniform", form="compiled")
    x = torch.randn(1, 8, 5, 6)
    _, evaluated = model._block_multiply_adds(block, x, block(x))
    assert evaluated == 9 * 8 * 16 * (2 + 5 * 6)


# ---- what is said


def test_a_form_that_cannot_be_had_says_why_and_what_to_do(monkeypatch):
    monkeypatch.setattr(mixing, "missing", lambda: "There is no C++ compiler.")
    with pytest.raises(ValueError, match=r"cannot be had here: There is no C\+\+ .*form='auto'"):
        IntermediateBlock(8, 8, form="compiled")


@pytest.mark.parametrize("channels", [(12, 8), (8, 12)])
def test_channels_that_do_not_fit_are_named(channels, monkeypatch):
    monkeypatch.setattr(mixing, "missing", lambda: "")
    said = rf"in_channels={channels[0]} and out_channels={channels[1]}; it needs multiples of 8"
    with pytest.raises(ValueError, match=said):
        IntermediateBlock(*channels, form="compiled")


@here
def test_numbers_that_do_not_fit_are_named():
    block = IntermediateBlock(8, 8, form="compiled").double()
    said = r"torch\.float64 numbers on cpu; it needs a CPU and float32"
    with pytest.raises(ValueError, match=said):
        block(torch.randn(1, 8, 4, 4).double())


@here
@pytest.mark.parametrize("change", [{"stride": 2}, {"channels": 12}])
def test_a_form_that_is_set_later_is_checked_when_it_is_used(change):
    """Else the program would write beside its arrays."""
    block = IntermediateBlock(change.get("channels", 8), 8, stride=change.get("stride", 1))
    block.form = "compiled"
    with pytest.raises(ValueError, match="form='compiled' is not allowed with"):
        block(torch.randn(2, change.get("channels", 8), 4, 4))


@here
def test_what_does_not_fit_never_reaches_the_program():
    x, a, kernels = torch.randn(2, 12, 4, 4), torch.rand(2, 2), torch.randn(2, 8, 12, 3, 3)
    for wrong in (x, x[:, :8].double()):
        with pytest.raises(mixing.Unavailable, match=r"maps of (12|8) and 8 channels"):
            mixing.convolved(wrong, a, kernels[:, :, : wrong.shape[1]])


@pytest.fixture
def compiling_anew(monkeypatch, tmp_path):
    """Nothing is compiled yet, on a CPU with AVX-512."""
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for cached in (mixing._library, mixing.missing):
        cached.cache_clear()
    yield tmp_path
    for cached in (mixing._library, mixing.missing):
        cached.cache_clear()


def test_without_avx512_nothing_is_compiled(compiling_anew, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert mixing.missing() == "The CPU, or PyTorch on it, calculates with AVX2, not AVX-512."
    assert not (compiling_anew / "build").exists()


def test_without_a_compiler_that_is_said(compiling_anew, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert mixing.missing() == "There is no C++ compiler no-such-compiler (CXX can name another)."


def test_what_the_compiler_says_is_passed_on_and_nothing_left(compiling_anew, monkeypatch):
    compiler = compiling_anew / "compiler"
    compiler.write_text("#!/bin/sh\necho 'mixing.cpp:1: error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    said = "mixing.cpp could not be compiled: mixing.cpp:1: error: no such header"
    assert mixing.missing() == said
    assert not list((compiling_anew / "build").iterdir())


def test_a_program_that_cannot_be_loaded_is_done_without(compiling_anew, monkeypatch):
    monkeypatch.setattr(mixing, "_compile", lambda *given: None)
    monkeypatch.setenv("CXX", ANY_PROGRAM)
    assert "without the file it is compiled anew" in mixing.missing()


def test_a_folder_that_cannot_be_written_is_done_without(compiling_anew, monkeypatch):
    (compiling_anew / "build").write_text("a file")
    monkeypatch.setenv("CXX", ANY_PROGRAM)
    assert mixing.missing().startswith("mixing.cpp could not be compiled: ")


@here
def test_it_may_be_asked_for_first_where_no_gradients_are(compiling_anew):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixing.missing() == ""


def test_a_program_that_refuses_what_it_is_given_is_done_without(compiling_anew, monkeypatch):
    def refuse():
        raise mixing.Unavailable("oneDNN refuses products of torch.bfloat16 numbers here.")

    monkeypatch.setattr(mixing, "_agrees", refuse)
    assert mixing.missing().startswith("oneDNN refuses products")


def test_without_its_source_that_is_said(compiling_anew, monkeypatch):
    monkeypatch.setattr(mixing, "SOURCE", compiling_anew / "mixing.cpp")
    monkeypatch.setenv("CXX", ANY_PROGRAM)
    assert mixing.missing() == "mixing.cpp is missing."


@here
def test_a_program_that_computes_something_else_is_not_trusted(compiling_anew, monkeypatch):
    source = compiling_anew / "mixing.cpp"
    wrong = mixing.SOURCE.read_text().replace("float(a[j * a_row + l]) * w", "w")
    assert wrong != mixing.SOURCE.read_text()
    source.write_text(wrong)
    monkeypatch.setattr(mixing, "SOURCE", source)
    assert mixing.missing() == "mixing.cpp was compiled, but does not compute what it should."


@here
def test_it_is_compiled_once_for_all_processes(compiling_anew, monkeypatch):
    """Two that begin at the same time each find a whole program."""
    code = (
        "import sys; from pathlib import Path; from helpers import data, mixing; "
        "data.ROOT = Path(sys.argv[1]); print(repr(mixing.missing()))"
    )
    command = [sys.executable, "-c", code, str(compiling_anew)]
    environment = os.environ | {"PYTHONPATH": str(mixing.SOURCE.parent.parent)}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["''", "''"]
    assert [path.suffix for path in (compiling_anew / "build").iterdir()] == [".so"]
    monkeypatch.setattr(mixing, "_compile", None)
    assert mixing.missing() == "", "found, and not compiled again"


def test_a_record_says_whether_blocks_could_be_compiled():
    hardware = runs.surroundings(torch.device("cpu"))["hardware"]
    assert hardware["compiled"] == (not mixing.missing())


def test_the_benchmark_does_without_it(monkeypatch):
    monkeypatch.setattr(mixing, "missing", lambda: "There is no C++ compiler.")
    monkeypatch.setattr(bench, "SHAPES", ((8, 8, 4),))
    monkeypatch.setattr(bench, "SWEPT", ())
    monkeypatch.setattr(bench, "MIXED", ())
    monkeypatch.setattr(bench, "precisions", lambda: ["float32"])
    assert set(bench.bench_blocks()["form"]) == set(model.FORMS) - {"compiled"}
    monkeypatch.setattr(bench, "fresh_process", lambda *_: {"milliseconds": 1.0, "first": 1.0})
    assert "mixed kernels, compiled, in every block" not in set(bench.bench_tried()["tried"])
