"""Host time of the Triton kernels over the stub of libcuda, by Triton's JIT and by handles.

    python host_time.py LIBRARY CAPABILITY

Prints microseconds of one thread as JSON, the shortest of many calls: of the launches of a backward pass, with the
checks of their operands, and of a whole backward pass of a small layer, which includes PyTorch's kernels on the CPU.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import launches
import torch

from pyfeedback.kernels import handles

REPETITIONS = 1000
TIMED = ("wm, pointwise", "ia, small", "ia")  # one, two and three launches


def shortest(call: Callable[[], Any], allowed: bool) -> float:
    """The time of the shortest call in microseconds, with or without handles."""
    handles.handles_allowed = allow if allowed else lambda: False
    times = []
    for _ in range(REPETITIONS):
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
    print(json.dumps(table))


if __name__ == "__main__":
    main()
