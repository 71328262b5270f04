"""Measure and check the kernels on this machine: ``python -m pyfeedback tune`` and ``python -m pyfeedback check``."""

import argparse
import sys
from collections.abc import Iterator

import torch

import pyfeedback
from pyfeedback import tuning
from pyfeedback.backends.choices import Signature, signature_of
from pyfeedback.core.coefficients import Coefficients
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


def tune(options: argparse.Namespace, device: torch.device) -> int:
    """Measure the layers of a network, and store the choices."""
    found = list(signatures(options.network, options.rule, options.batch, DTYPES[options.dtype], device))
    print(tuning.measure(list(dict.fromkeys(found)), device, options.budget, progress=True))
    return 0


def check(options: argparse.Namespace, device: torch.device) -> int:
    """Print the error of every candidate against float64; the exit status is 1 if one of them is wrong."""
    print(f"{pyfeedback.build_info()}\n{'layer':64} {'candidate':28} {'error':>9}")
    wrong = 0
    for name in [options.dtype] if options.dtype else DTYPES:
        found = [s for rule in RULES for s in signatures(options.network, rule, options.batch, DTYPES[name], device)]
        for signature in dict.fromkeys(found):
            for candidate in tuning.candidates(signature, device):
                wrong += candidate.refused is not None
                error = "" if candidate.error is None else f"{candidate.error:9.1e}"
                print(f"{tuning.shown(signature):64} {candidate.choice!s:28} {error:>9}  {candidate.refused or ''}")
    print(f"{wrong} wrong" if wrong else "all are correct")
    return 1 if wrong else 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m pyfeedback", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, batch in (("tune", tune, 16), ("check", check, 2)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--network", choices=NETWORKS, default="resnet20", help="default %(default)s")
        command.add_argument("--batch", type=_positive, default=batch, help="default %(default)s")
        command.add_argument("--device", help="default: cuda if available, else cpu")
        every = "" if name == "check" else "float32"
        command.add_argument("--dtype", choices=DTYPES, default=every or None, help=f"default {every or 'all'}")
    commands.choices["tune"].add_argument("--rule", choices=RULES, default="ia", help="default %(default)s")
    commands.choices["tune"].add_argument("--budget", type=float, default=60.0, help="seconds; default %(default)s")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return options.run(options, device)


if __name__ == "__main__":
    sys.exit(main())
