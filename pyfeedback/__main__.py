"""What is installed, which kernels are correct and fast on this machine, and what would be converted in a model."""

import argparse
import dataclasses
import importlib.metadata
import inspect
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

import pyfeedback
from pyfeedback import tuning
from pyfeedback.backends.choices import Signature, signature_of
from pyfeedback.core.coefficients import Coefficients
from pyfeedback.rules import PRESETS
from pyfeedback.testing import CONVNEXT_T, MOBILENET_V2, RESNET18, RESNET20_CIFAR, RESNET50

NETWORKS = {
    "resnet18": RESNET18,
    "resnet20": RESNET20_CIFAR,
    "resnet50": RESNET50,
    "mobilenet_v2": MOBILENET_V2,
    "convnext_t": CONVNEXT_T,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RULES = ("fa", "wm", "ia", "sa", "aa", "kp")


def signatures(network: str, rule: str, batch: int, dtype: torch.dtype, device: torch.device) -> Iterator[Signature]:
    """The layers of a network in channels_last, without bias."""
    chosen = pyfeedback.rule(rule)
    for shape in NETWORKS[network]:
        sizes = (
            (batch, shape.in_channels, shape.map_size, shape.map_size),
            (shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel),
        )
        empty = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
        input, weight = (t.contiguous(memory_format=torch.channels_last) for t in empty)
        coefficients = chosen.fixed or Coefficients()
        needed = (True, True, chosen.reads_data or bool(chosen.tie), False)
        yield signature_of(shape.geometry, input, weight, coefficients, needed, True)


def info(options: argparse.Namespace) -> int:
    """Print the versions, the compiled libraries, and the processor or GPU."""
    facts = {
        **dataclasses.asdict(pyfeedback.build_info()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }
    lines = [f"{name.replace('_', ' '):20} {_text(value)}" for name, value in facts.items()]
    print(json.dumps(facts, indent=1) if options.json else "\n".join(lines))
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def convert_report(options: argparse.Namespace) -> int:
    """Print what pyfeedback.convert would do with a model; the exit status is 1 if it leaves layers with weights."""
    report = pyfeedback.convert(options.model(), options.rule, return_report=True)[1]
    found = {"rule": options.rule, "converted": report.changed, "left": report.left}
    print(json.dumps(found | {"not_in_place": report.not_in_place}, indent=1) if options.json else report)
    return 1 if report.left or not report.changed else 0


def tune(options: argparse.Namespace) -> int:
    """Measure the layers of a network, and store the choices."""
    device = options.device
    found = list(signatures(options.network, options.rule, options.batch, DTYPES[options.dtype], device))
    print(tuning.measure(list(dict.fromkeys(found)), device, options.budget, progress=True))
    return 0


def check(options: argparse.Namespace) -> int:
    """Print the error of every kernel against float64; the exit status is 1 if one of them is wrong."""
    wrong, rows = 0, []
    if not options.json:
        print(f"{pyfeedback.build_info()}\n{'':64} {'implementation':28} {'error':>9}")
    for what, implementation, error, refused in checks(options, options.device):
        wrong += refused is not None
        rows.append({"what": what, "implementation": implementation, "error": error, "refused": refused})
        if not options.json:
            number = "" if error is None else f"{error:.1e}"
            print(f"{what:64} {implementation:28} {number:>9}  {refused or ''}", flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{wrong} wrong" if wrong else "all are correct")
    return 1 if wrong else 0


Check = tuple[str, str, float | None, str | None]  # what, its implementation, its error, and why it is wrong


def checks(options: argparse.Namespace, device: torch.device) -> Iterator[Check]:
    """Compare the layers of a network under each rule, and the ops on all weights of a model, with float64."""
    info = pyfeedback.build_info()
    compiled = info.cpu and (info.cuda or device.type == "cpu")
    for name in [options.dtype] if options.dtype else DTYPES:
        found = [s for rule in RULES for s in signatures(options.network, rule, options.batch, DTYPES[name], device)]
        for signature in dict.fromkeys(found):
            for candidate in tuning.candidates(signature, device):
                yield tuning.shown(signature), str(candidate.choice), candidate.error, candidate.refused
        for what, run in OPS.items():
            with pyfeedback.backend("composite"):
                exact, default = run(torch.float64, device), run(DTYPES[name], device)
            allowed = tuning.ERROR * relative(default, exact) + torch.finfo(DTYPES[name]).eps
            for backend in ("composite", "extension") if compiled else ("composite",):
                with pyfeedback.backend(backend):
                    error = relative(run(DTYPES[name], device), exact)
                refused = None if error <= allowed else f"error {error:.1e}, expected at most {allowed:.1e}"
                yield f"{what}, {name}", backend, error, refused


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error in the norm."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def model_of(dtype: torch.dtype, device: torch.device, rule: str | pyfeedback.Rule) -> torch.nn.Module:
    """A model of layers of several sizes with gradients, the same for each dtype but for rounding."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (17, 64), (64, 129), (256, 512)]
    model = torch.nn.Sequential(*(torch.nn.Linear(c, k) for c, k in sizes))
    pyfeedback.convert(model, rule).to(device, dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
        p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
    return model


def stepped(optimizer: str, rule: pyfeedback.Rule, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """All weights and feedback weights after three steps of an optimizer."""
    model = model_of(dtype, device, rule)
    step = getattr(pyfeedback.optim, optimizer)(model, lr=0.01, weight_decay=0.01).step
    for _ in range(3):
        step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def aligned(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The angles and ratios of norms of all layers."""
    found = pyfeedback.alignment(model_of(dtype, device, "fa")).values()
    return torch.tensor([(each.angle, each.norm_ratio) for each in found], dtype=torch.float64)


def centered(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A batch with a mean of five standard deviations, minus its mean."""
    batch = torch.randn(9, 7, 6, 5, generator=torch.Generator().manual_seed(0)) + 5
    return torch.ops.pyfeedback.center(batch.to(device, dtype), 9)


# Coefficients of 1: with those of the paper, the squares in AdamW's state are too small for float16.
UPDATES = {"sa": pyfeedback.rule("sa", self_=1.0, decay=1.0), "kp": pyfeedback.rule("kp")}
OPS: dict[str, Callable[[torch.dtype, torch.device], torch.Tensor]] = {
    **{f"{o} under {name}": partial(stepped, o, rule) for o in ("SGD", "AdamW") for name, rule in UPDATES.items()},
    "alignment": aligned,
    "center": centered,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m pyfeedback", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (info, check, tune, convert_report):
        command = commands.add_parser(run.__name__.replace("_", "-"), help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if run is not tune:
            command.add_argument("--json", action="store_true", help="print JSON")
        if run in (check, tune):
            command.add_argument("--network", choices=NETWORKS, default="resnet20", help="default %(default)s")
            command.add_argument(
                "--batch", type=_positive, default=2 if run is check else 16, help="default %(default)s"
            )
            default = "cuda" if torch.cuda.is_available() else "cpu"
            command.add_argument("--device", type=_device, default=default, help="default here: %(default)s")
            every = None if run is check else "float32"
            command.add_argument("--dtype", choices=DTYPES, default=every, help=f"default {every or 'all'}")
    commands.choices["tune"].add_argument("--rule", choices=RULES, default="ia", help="default %(default)s")
    commands.choices["tune"].add_argument("--budget", type=_seconds, default=60.0, help="seconds; default %(default)s")
    report = commands.choices["convert-report"]
    report.add_argument("model", type=_model, help="module:function, such as torchvision.models:resnet18")
    report.add_argument("--rule", choices=PRESETS, default="ia-probes", help="default %(default)s")
    return parser.parse_args(arguments)


def _model(text: str) -> Callable[[], torch.nn.Module]:
    """The function that makes the model; called without arguments, as in the folder where the program was started."""
    module, _, name = text.partition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form module:function")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be called without arguments: {error}") from None
    return function


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {str(error).splitlines()[0]}") from None
    if device.type == "meta":
        raise argparse.ArgumentTypeError(f"{text!r} computes nothing")
    return device


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    options = parse(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
