"""Train a network by any rule of pyfeedback.

    python examples/train.py digits-ia                              # a named configuration; --list shows them
    python examples/train.py cifar10 --rule sa --out runs/sa        # with another rule
    python examples/train.py cifar10 --rule ia --coefficients amp=0.01 null=0.01 reduction=mean
    torchrun --nproc-per-node 4 examples/train.py imagenet-kp --root /data/imagenet --autocast --channels-last

The folder --out gets metrics.csv, alignment.csv, alignment.png, settings.json and checkpoint.pt. A run that was
interrupted, by whatever, goes on where its last checkpoint was: the same command with --resume. Its results are then
bit by bit those of a run without interruption, on a CPU, and on a GPU with --deterministic.
"""

import argparse
import ast
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from training import checkpoint, data, place
from training.configurations import CONFIGURATIONS
from training.logs import Logs
from training.loop import Run
from training.settings import Settings

import pyfeedback


def main() -> None:
    options = parse()
    with errors_in_one_line():
        settings = settings_of(options)
        device = place.device(options.device)
    with place.joined(device, settings.deterministic) as here:
        try:
            train(settings, options, here)
        except KeyboardInterrupt:
            raise SystemExit("train.py: interrupted; --resume goes on from the last checkpoint") from None


def train(settings: Settings, options: argparse.Namespace, here: place.Place) -> None:
    """From the start or the last checkpoint to the end, writing on the way."""
    path = options.out / "checkpoint.pt"
    with errors_in_one_line():
        if path.exists() and not options.resume:
            raise ValueError(f"out is {options.out}, which holds a run: expected --resume, or another folder")
        run = Run(settings, data.load(settings.data, options.root, options.download), here, options.workers)
        if path.exists():
            run.load_state_dict(checkpoint.load(path))
        logs = Logs(run, options.out, options.tensorboard) if here.first else None

    def save():
        state = run.state_dict()
        if logs:
            checkpoint.save(state, path)

    def after_step():
        if logs:
            logs.after_step()
        if options.checkpoint_every and run.steps % options.checkpoint_every == 0:
            save()

    def after_epoch():
        if logs:
            logs.after_epoch()
        save()  # last: what a kill in between has cost is written again

    run.train(after_step, after_epoch)
    if logs:
        logs.close()


@contextmanager
def errors_in_one_line():
    """What is refused before the first step needs no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from None


def parse() -> argparse.Namespace:
    """The command line; an option that was not given is absent, and the configuration decides."""
    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    parser.add_argument("configuration", nargs="?", default="digits-bp", help="default %(default)s")
    parser.add_argument("--list", action="store_true", help="show the configurations and their sources")
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, default=Path("run"), help="folder of the results, default %(default)s")
    run.add_argument("--resume", action="store_true", default=False, help="go on from the checkpoint in --out, if any")
    run.add_argument("--root", type=Path, default=Path("data"), help="folder of torchvision's data sets")
    run.add_argument("--download", action="store_true", default=False, help="let torchvision fetch the data set")
    run.add_argument("--device", default=None, help="default a GPU where there is one")
    run.add_argument("--workers", type=int, default=0, help="processes that load images, default %(default)s")
    run.add_argument("--checkpoint-every", type=int, default=0, help="steps between checkpoints within an epoch")
    run.add_argument("--tensorboard", action="store_true", default=False, help="write TensorBoard events to --out too")
    group = parser.add_argument_group("settings", "where the configuration is to be changed")
    group.add_argument("--coefficients", nargs="+", metavar="NAME=VALUE", help="of the rule, as pyfeedback.Rule's")
    hints = get_type_hints(Settings)
    for each in fields(Settings):
        group.add_argument(f"--{each.name.replace('_', '-')}", help=each.metadata["help"], **_kind(hints[each.name]))
    options = parser.parse_args()
    if "list" in options:
        for name, configuration in CONFIGURATIONS.items():
            print(f"{name:28} {configuration.source}")
        parser.exit()
    return options


def _kind(hint) -> dict:
    """How argparse reads a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint == tuple[int, ...]:
        return {"type": int, "nargs": "*"}
    if hint is pyfeedback.Rule:
        return {}
    return {"type": next((t for t in get_args(hint) if t is not NoneType), hint)}


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of the configuration, changed as the options say.

    Raises:
        ValueError: a name or value that is none.
    """
    if options.configuration not in CONFIGURATIONS:
        raise ValueError(f"configuration is {options.configuration!r}, expected one of those that --list shows")
    settings = CONFIGURATIONS[options.configuration].settings
    given = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name in options}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    rule = given.pop("rule", settings.rule)
    settings = replace(settings, **given)
    coefficients = dict(_coefficient(text) for text in getattr(options, "coefficients", ()))
    if rule in ("kp", "pfa"):
        coefficients.setdefault("decay", settings.weight_decay)  # both weights decay at the same rate
    try:
        return replace(settings, rule=pyfeedback.rule(rule, **coefficients))
    except TypeError:
        names = ", ".join(f.name for f in fields(pyfeedback.Rule))
        raise ValueError(f"coefficients are {', '.join(coefficients)}, expected some of {names}") from None


def _coefficient(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


if __name__ == "__main__":
    main()
