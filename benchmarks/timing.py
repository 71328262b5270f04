"""The timing loop: implementations alternate, timed by the clock on a CPU and by events with a cold L2 on a GPU."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSHED_BYTES = 256 * 2**20  # several times the L2 of any GPU
LONGEST_SLEEP = 0.02
SLEEP_HERTZ = 2e9  # at or above the clock of any GPU: a sleep is never too short


def _nothing() -> None:
    pass


class Step(NamedTuple):
    """A timed function, and a preparation that runs before each measurement, outside the timing."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing


class HostTimer:
    """Seconds per run, averaged over ``repeats`` runs, by the monotonic clock or another clock."""

    def __init__(self, repeats: int = 1, clock: Callable[[], float] = time.perf_counter):
        self.repeats, self._clock = repeats, clock

    def __call__(self, step: Step) -> float:
        step.prepare()
        start = self._clock()
        for _ in range(self.repeats):
            step.run()
        return (self._clock() - start) / self.repeats


class DeviceTimer:
    """Seconds of one run between two CUDA events, with a cold L2.

    With ``hide_launches``, the device sleeps until the whole run is queued: the result is the time of the kernels,
    without Python's. Otherwise it is the time that a training loop takes.
    """

    def __init__(self, device: torch.device, hide_launches: bool = True):
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        self._hide_launches = hide_launches
        self._launch_seconds: dict[Step, float] = {}
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, step: Step) -> float:
        step.prepare()
        self._flushed.zero_()
        launch = self._launch_seconds.get(step, 0.0)
        if self._hide_launches and launch:
            torch.cuda._sleep(int(min(2 * launch, LONGEST_SLEEP) * SLEEP_HERTZ))
        begun = time.perf_counter()
        self._start.record()
        step.run()
        self._end.record()
        spent = time.perf_counter() - begun
        self._launch_seconds[step] = min(spent, launch or spent)
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def timer_for(
    device: torch.device, hide_launches: bool = True, processor_time: bool = False
) -> HostTimer | DeviceTimer:
    """The timer for this device."""
    if device.type == "cuda":
        return DeviceTimer(device, hide_launches)
    return HostTimer(clock=time.process_time if processor_time else time.perf_counter)


class Clock:
    """The timer passed to pytest-benchmark. Only the race advances it, so the statistics are those of one step."""

    __name__ = "race"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Race:
    """Times steps alternately, A B C C B A, so that other load on the machine affects all of them alike.

    Args:
        steps: by name; the others are compared with ``subject``.
        clock: advanced by the time of the subject in each round.
    """

    def __init__(
        self, steps: dict[str, Step], subject: str, timer: Callable[[Step], float], clock: Clock | None = None
    ):
        self.steps, self.subject, self._timer, self._clock = steps, subject, timer, clock
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}

    def warm_up(self, turns: int) -> float:
        """Run untimed rounds; return the seconds of the last one."""
        for _ in range(turns):
            begun = time.perf_counter()
            for step in self.steps.values():
                self._timer(step)
            spent = time.perf_counter() - begun
        return spent

    def round(self) -> None:
        """Run and time each step once."""
        backwards = len(self.seconds[self.subject]) % 2
        for name in list(self.steps)[:: -1 if backwards else 1]:
            self.seconds[name].append(self._timer(self.steps[name]))
        self._clock.now += self.seconds[self.subject][-1]

    def median(self, name: str) -> float:
        """The median time of one step in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, other: str) -> float:
        """Time of the subject relative to another step: the median over the rounds of the ratio within a round."""
        rounds = zip(self.seconds[self.subject], self.seconds[other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in rounds)
