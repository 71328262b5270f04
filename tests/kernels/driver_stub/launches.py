"""Launches every Triton kernel over the stub of libcuda, by Triton's JIT and by handles; checks what the driver gets.

    python launches.py LIBRARY CAPABILITY

Prints a line for each launch, and ends with an error at the first fault. Nothing is computed: the tensors are CPU
tensors, and the outputs stay as they were allocated.
"""

import gc
import os
import struct
import sys
from collections import Counter
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any, NamedTuple

from driver import DEVICES, STREAM, Recorded, Stub

STUB = Stub(Path(sys.argv[1]), DEVICES[int(sys.argv[2])])  # before anything else loads libcuda

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

import pyfeedback  # noqa: E402
from pyfeedback.core.coefficients import Coefficients  # noqa: E402
from pyfeedback.core.probes import ProbeProblem  # noqa: E402
from pyfeedback.kernels import backward, handles, probe_table  # noqa: E402
from pyfeedback.kernels.launch import WORKSPACE  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "*bf16", FP16: "*fp16", FP32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
SAME = ((1, 1), (1, 1), (1, 1))
DENSE = ((1, 1), (0, 0), (1, 1))


class Layer(NamedTuple):
    """Shapes of an input and a weight, and stride, padding and dilation; None for a linear layer."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    convolution: tuple | None


LARGE = Layer((64, 64, 56, 56), (64, 64, 3, 3), SAME)
SMALL = Layer((4, 64, 8, 8), (64, 64, 3, 3), SAME)
WIDE = Layer((8, 64, 56, 56), (256, 64, 1, 1), DENSE)
NARROW = Layer((8, 64, 56, 56), (64, 64, 1, 1), DENSE)
LINEAR = Layer((32768, 384), (384, 384), None)  # few tiles on every device, so that both sums are split

WM = {"amp": 1.0, "decay": 1.0, "center": True}
IA = {"amp": 0.3, "null": 1.0, "center": True}
KP = {"tie": 1.0, "decay": 0.1}
ALL = {"decay": 0.1, "amp": 1.0, "null": 0.3, "sparse": 1.0, "self_": 0.1, "tie": 0.5, "center": True}


class Case(NamedTuple):
    """One backward pass, and the kernels that it launches."""

    layer: Layer
    rule: dict[str, Any]
    algorithm: str
    kernels: str
    dtype: torch.dtype = BF16


CASES = {
    "fa": Case(LARGE, {}, "none", "wgrad finish dgrad"),
    "kp": Case(LARGE, KP, "none", "wgrad finish dgrad"),
    "wm": Case(LARGE, WM, "direct", "wgrad finish dgrad"),
    "aa": Case(LARGE, {"sparse": 1.0, "amp": 1.0, "center": True}, "direct", "wgrad finish dgrad"),
    "ia": Case(LARGE, IA, "direct", "dgrad wgrad finish wgrad finish"),
    "all terms, float16": Case(LARGE, ALL, "direct", "wgrad finish dgrad wgrad finish", FP16),
    "ia, float32": Case(LARGE, IA, "direct", "dgrad wgrad finish wgrad finish", FP32),
    "wm, small": Case(SMALL, WM, "direct", "joint finish"),
    "ia, small": Case(SMALL, IA, "direct", "joint wgrad"),
    "kp, pointwise": Case(NARROW, KP, "none", "pointwise finish"),
    "wm, pointwise": Case(NARROW, WM, "direct", "pointwise finish"),
    "ia, pointwise": Case(NARROW, IA, "direct", "pointwise finish"),
    "ia by x'x": Case(NARROW, IA, "input_gram", "pointwise finish"),
    "ia by y'y": Case(LINEAR, IA, "response_gram", "wgrad finish wgrad finish dgrad"),
}
PROBE_CASES = {
    "wm-probes": (Coefficients(amp=1.0, decay=1.0), "response gradient"),
    "ia-probes": (Coefficients(amp=1.0, null=1.0, decay=1.0, normalize=True), "response moment gradient"),
}


class Started(NamedTuple):
    """A launch through Triton's JIT."""

    kernel: JITFunction
    arguments: dict[str, Any]
    compiled: Any


STARTED: list[Started] = []
run_jit, run_launches, workspace = JITFunction.run, handles.Launcher.run, handles.workspace
start_probes = probe_table._start


def run_and_record(kernel: JITFunction, *args, grid, warmup, **named) -> Any:
    """Replacement of JITFunction.run that records each launch."""
    compiled = run_jit(kernel, *args, grid=grid, warmup=warmup, **named)
    STARTED.append(Started(kernel, dict(zip(kernel.arg_names, args, strict=False)) | named, compiled))
    return compiled


def run_twice(launcher: handles.Launcher, values: dict[str, Any]) -> None:
    """Replacement of Launcher.run: launches by the JIT and then by handles, and checks that both are the same."""
    run_launches(launcher, values)
    by_jit = check_started(STUB.take())
    same = {WORKSPACE: values[WORKSPACE]} if WORKSPACE in values else {}
    handles.workspace = lambda *_: same
    run_launches(launcher, values)
    handles.workspace = workspace
    assert not STARTED, "a handle was not used"
    assert STUB.take() == by_jit, "a handle launches something else than the JIT"


def start_probes_twice(launch: probe_table.Launch, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
    """Replacement of probe_table._start: by the JIT and then by a handle, and checks that both are the same."""
    probe_table._handles.clear()
    start_probes(launch, tensors, numbers)
    by_jit = check_started(STUB.take())
    start_probes(launch, tensors, numbers)
    assert not STARTED, "a handle was not used"
    assert STUB.take() == by_jit, "a handle launches something else than the JIT"


def check_started(recorded: list[Recorded]) -> list[Recorded]:
    """Check the launches through the JIT since the last call."""
    for started, r in zip(STARTED, recorded, strict=True):
        check_parameters(started, r)
        function = STUB.function(r.function)
        assert r.stream == STREAM
        launched.append(function.name.removesuffix("_kernel"))
        print(
            f"{launched[-1]:10} {r.grid[0]:5} x {r.grid[1]:3} programs of {r.block[0]} threads, {function.registers:3} "
            f"registers, {r.shared:6} bytes of shared memory, {function.stack} of stack",
            flush=True,
        )
    STARTED.clear()
    return recorded


launched: list[str] = []  # names of the kernels since the start of a case


def check_parameters(started: Started, recorded: Recorded) -> None:
    """Compare the parameters that the driver received with the arguments that were passed."""
    source, expected = started.compiled.src, []
    for i, name in enumerate(started.kernel.arg_names):
        expected += flat(started.arguments.get(name), source.signature[name], (i,), source.attrs)
    assert len(recorded.parameters) == len(expected) + 2, (recorded, expected)  # and two scratch buffers
    assert set(recorded.parameters[-2:]) == {bytes(8)}
    for (value, kind, divisible), found in zip(expected, recorded.parameters, strict=False):
        if isinstance(value, Tensor):
            assert kind == TYPES[value.dtype], (kind, value.dtype)
            assert divisible == (value.data_ptr() % 16 == 0)  # wide loads need it
            assert found == struct.pack("<Q", value.data_ptr())
        elif kind == "i32":
            assert not divisible or value % 16 == 0
            assert found == struct.pack("<i", value)
        else:
            assert kind == "fp32", (value, kind)
            assert found == struct.pack("<f", value)


def flat(value: Any, kind: Any, path: tuple[int, ...], attributes: dict) -> list[tuple[Any, str, bool]]:
    """(value, Triton's type, whether it is compiled as divisible by 16) of each argument that is no constant."""
    if isinstance(kind, tuple):
        parts = zip(value, kind, strict=True)
        return [found for i, (v, k) in enumerate(parts) for found in flat(v, k, (*path, i), attributes)]
    return [] if kind == "constexpr" else [(value, kind, bool(attributes.get(path)))]


def tensors(case: Case) -> list[Tensor]:
    """The gradient of the output, the input, both weights and the response, with channels innermost."""
    input, weight, convolution = case.layer
    output = (*input[:-1], weight[0]) if convolution is None else (input[0], weight[0], *input[2:])
    layout = torch.contiguous_format if convolution is None else torch.channels_last
    shapes = (output, input, weight, weight, output)
    return [torch.zeros(s, dtype=case.dtype).contiguous(memory_format=layout) for s in shapes]


def layer_backward(case: Case, operands: list[Tensor] | None = None) -> None:
    """The backward pass of a case."""
    backward.layer_backward(
        *(operands or tensors(case)), convolution=case.layer.convolution, rule=Coefficients(**case.rule),
        mask=(True, True, bool(case.rule), False), algorithm=case.algorithm,
        center=torch.ops.pyfeedback.center.default,
    )  # fmt: skip


def probe_problems(rule: Coefficients, rows: tuple[int, ...] = (64, 48), dtype=FP32) -> list[ProbeProblem]:
    """Layers with so many rows, 64 inputs and 32 probes each."""
    return [
        ProbeProblem(*(torch.zeros(1, count, 64, dtype=dtype) for _ in range(2)), 32, rule, i)
        for i, count in enumerate(rows)
    ]


def check_falling_back(case: Case) -> None:
    """Handles start nothing with other tensors than their kernels were compiled for, and if a hook has to be called."""
    calls: list[tuple[handles.Launcher, dict[str, Any]]] = []
    handles.Launcher.run = lambda launcher, values: (calls.append((launcher, values)), run_launches(launcher, values))
    layer_backward(case)
    handles.Launcher.run = run_launches
    (launcher, values), *_ = calls
    STUB.take()
    STARTED.clear()
    assert launcher.bound.run(values)
    assert len(STUB.take()) == 2
    launch, _ = launcher.launches
    for name in set(launch.arguments.values()) & set(handles.GIVEN):
        t = values[name]
        shifted = torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
        for other in (shifted, t.float()):
            assert not launcher.bound.run(values | {name: other}), name
    assert STUB.take() == []
    for wrong in ({"y": values["y"][1:]}, {"x": values["x"].transpose(0, 1)}):
        with pytest.raises(ValueError, match="expected"):
            handles.Launcher([launch], launcher.device).run(values | wrong)
    seen: list[str] = []
    chain = triton.knobs.runtime.launch_enter_hook
    chain.add(lambda metadata: seen.append(metadata.get()["name"]))
    launcher.run(values)
    chain.calls.clear()
    launcher.run(values)
    assert seen == ["pointwise_kernel", "finish_kernel"]
    assert len(STARTED) == 2  # by the JIT
    assert len(STUB.take()) == 4


def check_probes_of_other_layers() -> None:
    """A handle launches for other layers, seeds and steps, of one dtype."""
    rule, _ = PROBE_CASES["ia-probes"]
    probe_table._handles.clear()
    probe_table.probe_gradients(probe_problems(rule), 1, 1)
    started, first = len(STARTED), STUB.take()
    probe_table.probe_gradients(probe_problems(rule, (640, 80)), 2**40 + 3, -5)
    assert len(STARTED) == started == 3
    found = STUB.take()
    assert [r.function for r in found] == [r.function for r in first]
    assert [r.grid for r in found] == [(12, 1, 1), (2, 1, 1), (12, 1, 1)]
    assert found[2].parameters[3:6] == tuple(struct.pack("<i", number) for number in (3, 2**8, -5))
    assert {dtype for _, dtype, *_ in probe_table._handles} == {FP32}
    STARTED.clear()


def check_nothing_is_kept(case: Case) -> None:
    """Not even by the first call: its tensors may be in the memory pool of a CUDA graph, which gives them to others.

    They are also in a warm-up under mode="reduce-overhead", where nothing is captured. Probes are refused there, and
    keep their table.
    """
    backward.planned.cache_clear()
    operands, (rule, _) = tensors(case), PROBE_CASES["wm-probes"]
    problems = probe_problems(rule, (96, 48))
    gc.collect()
    before = living_tensors()
    for _ in range(2):  # by the JIT and by handles
        layer_backward(case, operands)
        STARTED.clear()
    assert living_tensors() == before
    for _ in range(2):
        probe_table.probe_gradients(problems, 1, 1)
        STARTED.clear()
    assert sorted(living_tensors() - before) == [(torch.int64, 2 * probe_table.T.COLUMNS)]
    STUB.take()


def living_tensors() -> Counter[tuple[torch.dtype, int]]:
    """The dtypes and sizes of all tensors in the process."""
    return Counter((t.dtype, t.numel()) for t in gc.get_objects() if type(t) is Tensor)


def check_refusals(kernel: Any) -> None:
    """The stub refuses what the device would."""
    warps, ctas, shared = kernel.packed_metadata
    limit = STUB.device.shared_per_block
    for grid, metadata, message in (
        ((1, 65536, 1), kernel.packed_metadata, "grid y is 65536, expected at most 65535"),
        ((1, 1, 1), (2 * warps, ctas, shared), f"threads of a block is {64 * warps}, expected at most {32 * warps}"),
        ((1, 1, 1), (warps, ctas, limit + 1), f"shared memory is {limit + 1}, expected at most {limit}"),
    ):
        with pytest.raises(RuntimeError, match=f"^Triton Error \\[CUDA\\]: {message}$"):
            kernel.run(*grid, 0, kernel.function, metadata, None, None, None, *[0] * len(kernel.src.fn.arg_names))
    assert STUB.take() == []


def check_layer() -> None:
    """A layer in a program, from the public interface to the launch."""
    # Tensors of the CPU are accepted, as by the interpreter.
    backward._INTERPRETED = True
    os.environ["TRITON_INTERPRET"] = "1"
    layer = pyfeedback.nn.Conv2d(64, 64, 3, padding=1, bias=False, rule=pyfeedback.Rule(**WM), dtype=BF16)
    layer = layer.to(memory_format=torch.channels_last)
    x = tensors(CASES["wm, small"])[1].requires_grad_()
    with pyfeedback.backend("triton"):
        for _ in range(2):
            layer(x).sum().backward()


def answer_as_the_device() -> None:
    """The kernels are planned for the device of the stub."""
    backward.architecture = probe_table.architecture = lambda device: STUB.device[:2]


def main() -> None:
    """All cases on one device."""
    answer_as_the_device()
    JITFunction.run, handles.Launcher.run = run_and_record, run_twice
    probe_table._start = start_probes_twice
    layers = {name: (lambda case=case: layer_backward(case), case.kernels) for name, case in CASES.items()}
    probes = {
        name: (lambda rule=rule: probe_table.probe_gradients(probe_problems(rule), 2**40 + 3, 5), kernels)
        for name, (rule, kernels) in PROBE_CASES.items()
    }
    for name, (run, kernels) in (layers | probes).items():
        print(f"{name}:", flush=True)
        launched.clear()
        run()
        assert launched == kernels.split(), f"{name} launches {launched}, expected {kernels.split()}"
    handles.Launcher.run, probe_table._start = run_launches, start_probes
    check_probes_of_other_layers()
    check_nothing_is_kept(CASES["ia"])
    check_falling_back(CASES["wm, pointwise"])
    check_refusals(STARTED[-1].compiled)
    STARTED.clear()
    check_layer()
    assert [STUB.function(r.function).name for r in STUB.take()] == 2 * ["joint_kernel", "finish_kernel"]
    assert len(STARTED) <= 2  # the second by a handle
    used = sum(getrusage(who).ru_utime for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    print(f"{len(layers | probes)} cases on sm_{STUB.device.capability}, {used:.0f} s of CPU time")


if __name__ == "__main__":
    main()
