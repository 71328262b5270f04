"""Host time of the Triton kernels over the stub of libcuda, by Triton's JIT and by handles.

    python host_time.py LIBRARY CAPABILITY

Prints microseconds of one thread as JSON, the shortest of many calls: of the launches of a backward pass, with the
checks of their operands; of a whole backward pass of a small layer, which includes PyTorch's kernels on the CPU; and of
the gradients of layers that read probes, whose table is built again in each estimate if they are orthogonal.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import launches
import torch

from pyfeedback.core.probes import ProbeCount, part_of
from pyfeedback.kernels import handles, probe_table

TIMED = ("wm, pointwise", "ia, small", "ia")  # one, two and three launches
LAYERS = 64  # of a network that reads probes
SWEEP = 4  # estimates


def shortest(call: Callable[[], Any], allowed: bool, repetitions: int = 1000) -> float:
    """The time of the shortest call in microseconds, with or without handles."""
    handles.handles_allowed = probe_table.handles_allowed = allow if allowed else lambda: False
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(min(times) * 1e6, 1)


allow = handles.handles_allowed


def launcher_of(case: launches.Case) -> tuple[handles.Launcher, dict[str, Any]]:
    """What runs the launches of a case, and their tensors and numbers."""
    found = []
    run = handles.Launcher.run
    handles.Launcher.run = lambda launcher, values: (found.append((launcher, values)), run(launcher, values))
    launches.layer_backward(case)
    handles.Launcher.run = run
    return found[0]


def probes(layers: int, orthogonal: bool = False) -> Callable[[], Any]:
    """The gradients of so many layers in one estimate after the other."""
    problems = launches.probe_problems(launches.PROBE_CASES["wm-probes"][0], (64,) * layers)
    estimates = [problems]
    if orthogonal:
        parts = [part_of(ProbeCount(0, 0, 0.0, SWEEP), 64, i) for i in range(4 * SWEEP)]
        estimates = [[problem._replace(part=part) for problem in problems] for part in parts]
    following = cycle(estimates)
    return lambda: probe_table.probe_gradients(next(following), 1, 1)


def main() -> None:
    """The table."""
    torch.set_num_threads(1)
    launches.answer_as_the_device()
    table = {}
    for name in TIMED:
        launcher, values = launcher_of(launches.CASES[name])
        table[name] = [shortest(partial(launcher.run, values), allowed) for allowed in (False, True)]
    small = launches.CASES["ia, small"]
    tensors = launches.tensors(small)
    table["ia, small: whole backward"] = [
        shortest(partial(launches.layer_backward, small, tensors), allowed) for allowed in (False, True)
    ]
    for name, call in (
        ("wm-probes, 2 layers", probes(2)),
        (f"wm-probes, {LAYERS} layers", probes(LAYERS)),
        (f"wm-probes, {LAYERS} layers, orthogonal", probes(LAYERS, orthogonal=True)),
    ):
        table[name] = [shortest(call, allowed, 200) for allowed in (False, True)]
    print(json.dumps(table))


if __name__ == "__main__":
    main()
