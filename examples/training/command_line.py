"""The command line of train.py. Every field of Settings is an option."""

import argparse
import ast
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pyfeedback
from training.configurations import CONFIGURATIONS
from training.settings import Settings

TIED = ("kp", "pfa")


def parse(description: str) -> argparse.Namespace:
    """Parse the options. Settings that are not given are absent and come from the configuration."""
    text = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, argument_default=argparse.SUPPRESS, formatter_class=text)
    what = "a name that --list shows, or a settings.json; default %(default)s"
    parser.add_argument("configuration", nargs="?", default="digits-bp", help=what)
    parser.add_argument("--list", action="store_true", help="show the configurations and their sources")
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, default=Path("run"), help="output folder, default %(default)s")
    run.add_argument(
        "--resume", action="store_true", default=False, help="continue from the checkpoint in --out, if there is one"
    )
    run.add_argument("--root", type=Path, default=Path("data"), help="folder of the data sets, default ./%(default)s")
    run.add_argument("--download", action="store_true", default=False, help="download the data set by torchvision")
    run.add_argument("--device", default=None, help="default: a GPU if available")
    run.add_argument("--workers", type=int, default=0, help="number of processes that load images, default %(default)s")
    run.add_argument("--checkpoint-every", type=int, default=0, help="steps between checkpoints within an epoch")
    run.add_argument("--tensorboard", action="store_true", default=False, help="also write TensorBoard events to --out")
    group = parser.add_argument_group("settings", "changes to the configuration")
    group.add_argument(
        "--coefficients", nargs="+", metavar="NAME=VALUE", help="coefficients of the rule: fields of pyfeedback.Rule"
    )
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
    """The argparse arguments for a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint == tuple[int, ...]:
        return {"type": int, "nargs": "*"}
    if pyfeedback.Rule in get_args(hint):
        return {"nargs": "+"}
    return {"type": next((t for t in get_args(hint) if t is not NoneType), hint)}


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of the configuration with the changes of the options.

    Raises:
        ValueError: if a name or a value is invalid.
    """
    for name in ("workers", "checkpoint_every"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} is {getattr(options, name)}, expected 0 or more")
    settings = _configuration(options.configuration)
    given = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name in options}
    if "milestones" in given:
        given["milestones"] = tuple(given["milestones"])
    words = given.pop("rule", None)
    settings = replace(settings, **given)
    coefficients = dict(_coefficient(text) for text in getattr(options, "coefficients", ()))
    if words is None and not coefficients:
        return settings
    rules = _rules(words, settings.weight_decay) if words else settings.rule
    if isinstance(rules, dict) and coefficients:
        raise ValueError(f"coefficients are {', '.join(coefficients)}, expected one rule that they belong to")
    try:
        return replace(settings, rule=pyfeedback.rule(rules, **coefficients) if coefficients else rules)
    except TypeError:
        names = ", ".join(f.name for f in fields(pyfeedback.Rule))
        raise ValueError(f"coefficients are {', '.join(coefficients)}, expected some of {names}") from None


def _configuration(name: str) -> Settings:
    if name in CONFIGURATIONS:
        return CONFIGURATIONS[name].settings
    if name.endswith(".json"):
        return Settings.from_json(Path(name).read_text())
    raise ValueError(f"configuration is {name!r}, expected one of those that --list shows, or a settings.json")


def _rules(words: list[str], decay: float) -> pyfeedback.Rule | dict[str, pyfeedback.Rule]:
    """One rule by name, or rules by layer name pattern from words of the form PATTERN=NAME."""
    named = {pattern or "*": name for pattern, _, name in (word.rpartition("=") for word in words)}
    tied = {"decay": decay}  # kp and pfa: both weights decay at the same rate
    rules = {pattern: pyfeedback.rule(name, **(tied if name in TIED else {})) for pattern, name in named.items()}
    return rules["*"] if list(rules) == ["*"] else rules


def _coefficient(text: str) -> tuple[str, object]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")
