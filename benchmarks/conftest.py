"""Benchmarks: the cost of a training step under each rule, relative to backprop and to other implementations.

    pytest benchmarks --benchmark-only                       # a sample of networks and layers in under ten minutes
    pytest benchmarks --benchmark-only --quick               # with fewer rounds and a smaller batch
    pytest benchmarks --benchmark-only --full                # all layers and networks: hours
    pytest benchmarks --benchmark-only --network resnet20 --rule ia --benchmark-json out.json
    pytest benchmarks                                        # check every result, time nothing

`test_layer_steps.py`   forward and backward of one layer: plain backprop, pyfeedback, the reference (the paper's
                        regularizers by autograd), the composition of PyTorch's calls; --compile adds the compiled
                        reference
`test_probe_steps.py`   layers and networks with their optimizer, for rules that read probes, at several ages of a run
`test_network_steps.py` a whole training step of a network with its optimizer, and its peak memory
`test_feedback_step.py` the multi-tensor update of all feedback weights
`test_optimizers.py`    the whole-model optimizers against torch.optim with a separate update of the feedback
`test_alignment.py`     angles and norms of all layers in one call
`test_peers.py`         a step under feedback alignment against BioTorch's; `peers.py` compares features
`test_call_overhead.py` the overhead per call of a tiny layer

The last table of a run has the time of a whole training step of each network, relative to backprop. From the files of
--benchmark-json, `step_figure.py` draws a figure of it.

Machines are noisy, so the implementations alternate within one benchmark, A B C C B A. The reported figure is the
median over the rounds of the ratio within a round. pytest-benchmark's own statistics are those of pyfeedback;
``extra_info`` has the ratios and the times of the others. Nothing is timed before its gradients agree with float64.
OMP_NUM_THREADS sets the number of threads; on a shared machine, use one thread and --processor-time. On a GPU, times
come from CUDA events after the L2 is flushed, with cudnn.benchmark on. Launch overhead is hidden where the kernels of a
layer are measured.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# What pyfeedback.tune has measured on this machine must not change what is reported.
os.environ.setdefault("PYFEEDBACK_TUNE", "off")

import machine
import tables
from implementations import BASELINES, SUBJECT
from selection import DEPTHWISE, DTYPES, PROBES, RULES, WHOLE_NETWORKS, Selection
from timing import Clock, Race, Step, timer_for

FIRST = ("test_network_steps", "test_probe_steps")

CLOCK = Clock()
SELECTION = pytest.StashKey[Selection]()
RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("pyfeedback benchmarks")
    group.addoption("--quick", action="store_true", help="a sample of the layers, a small batch, few rounds")
    group.addoption("--full", action="store_true", help="all layers and networks, not a sample of them")
    group.addoption("--device", default=None, help="cpu or cuda (default: cuda if available)")
    group.addoption(
        "--batch", type=int, default=0, help="batch size of the layers (default: 16; 128 on cuda; 8 with --quick)"
    )
    group.addoption(
        "--network", action="append", choices=[*WHOLE_NETWORKS, *DEPTHWISE], help="all of this network, and only it"
    )
    group.addoption("--rule", action="append", choices=list(RULES), help="only this rule")
    group.addoption("--dtype", action="append", choices=list(DTYPES), help="default: float32; on cuda also bfloat16")
    group.addoption("--against", action="append", choices=list(BASELINES), help="only this baseline")
    group.addoption("--compile", action="store_true", help="also torch.compile of the reference and of whole networks")
    group.addoption("--backward-only", action="store_true", help="time only the backward pass of a layer")
    group.addoption("--processor-time", action="store_true", help="measure processor time, for a shared machine")
    group.addoption("--contiguous", action="store_true", help="whole networks in contiguous memory, not channels_last")
    group.addoption(
        "--budget", type=float, default=0.0, help="seconds for the rounds of one benchmark, beyond a minimum"
    )
    group.addoption(
        "--time-limit",
        type=float,
        default=0.0,
        help="seconds after which the remaining benchmarks are skipped (default: 540 for a sample)",
    )


def pytest_configure(config):
    option = config.getoption
    if option("quick") and option("full"):
        raise pytest.UsageError("--quick is set with --full, expected one of them")
    cuda = torch.cuda.is_available()
    config.stash[SELECTION] = Selection(
        device=torch.device(option("device") or ("cuda" if cuda else "cpu")),
        quick=option("quick"),
        full=option("full"),
        timed=option("benchmark_only"),
        compiled=option("compile"),
        backward_only=option("backward_only"),
        processor_time=option("processor_time"),
        contiguous=option("contiguous"),
        batch=option("batch"),
        networks=option("network") or [],
        rules=option("rule") or [],
        dtypes=option("dtype") or [],
        against=option("against") or [],
        budget=option("budget"),
        time_limit=option("time_limit"),
    )
    config.stash[RECORDS] = []
    # Without --benchmark-only, every step runs once and nothing is timed.
    config.option.benchmark_disable = config.option.benchmark_disable or not option("benchmark_only")
    torch.backends.cudnn.benchmark = True


def pytest_generate_tests(metafunc):
    selection = metafunc.config.stash[SELECTION]
    if "dtype_name" in metafunc.fixturenames:
        metafunc.parametrize("dtype_name", selection.dtypes)
    if "rule_name" in metafunc.fixturenames:
        probes = metafunc.definition.path.stem == "test_probe_steps"
        metafunc.parametrize("rule_name", [name for name in selection.rules if (name in PROBES) == probes])
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", selection.layers(), ids=lambda shape: shape.name)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in FIRST)  # before the time limit has passed
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def selection(request):
    """What this run measures."""
    chosen = request.config.stash[SELECTION]
    if chosen.out_of_time():
        pytest.skip(f"the time limit of {chosen.time_limit:.0f} s has passed")
    return chosen


@pytest.fixture
def race(request, benchmark, selection):
    """``race(kind, steps, **info)``: time the steps alternately; record the medians and the ratios to pyfeedback."""

    def run(kind: str, steps: dict[str, Step], timer=None, hide_launches: bool = True, group: str = "", **info) -> None:
        timer = timer or timer_for(selection.device, hide_launches, selection.processor_time)
        contest = Race(steps, SUBJECT, timer, CLOCK)
        benchmark.group = group or kind
        if not selection.timed:
            benchmark.pedantic(contest.round)
            return
        turns = 3 if selection.device.type == "cuda" else 1
        benchmark.pedantic(contest.round, rounds=selection.rounds(contest.warm_up(turns)))
        record = {
            "kind": kind,
            **info,
            "implementation": SUBJECT,
            "threads": torch.get_num_threads(),
            "seconds": {name: contest.median(name) for name in steps},
            **{f"ratio_to_{name}": contest.ratio(name) for name in steps if name != SUBJECT},
        }
        benchmark.extra_info.update(record)
        request.config.stash[RECORDS].append(record)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info["pyfeedback"] = machine.facts(config.stash[SELECTION].device)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    records = config.stash[RECORDS]
    if records:
        terminalreporter.section("time of pyfeedback relative to the others")
        for line in tables.report(records, per_layer=config.getoption("verbose") > 0):
            terminalreporter.write_line(line)
