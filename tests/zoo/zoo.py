"""The model zoo: small models of other packages, converted, checked and trained for a step. `make zoo`.

Each model is built from its configuration, so nothing is downloaded, and checked in a process of its own:

* every layer with weights has a feedback path or is reported with a reason, and every feedback path is used,
* the gradients are those of the reference in float64,
* a step under each of four rules gives finite losses and moves the feedback weights that learn,
* with --compiled, the compiled model has the same gradients; this takes longer, and is another run.

Results are kept in docs/models.json after each model, and a model is checked again only if the package or its library
changed; docs/models.md is the table.

    python tests/zoo/zoo.py --only "timm.swin*" --again      # some models
    python tests/zoo/zoo.py --minutes 20                     # as many models as fit in the time
    python tests/zoo/zoo.py --compiled --minutes 20          # compile as many models as fit in the time
    python tests/zoo/zoo.py --table                          # only write the table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import zoo_checks as checks
from zoo_models import MODELS

ROOT = Path(__file__).resolve().parents[2]
KEPT, TABLE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
PACKAGES = ("torch", "torchvision", "timm", "transformers", "torch_geometric")
LONGEST, LONGEST_COMPILATION = 90, 600  # time limits for a model, in seconds

Result = dict[str, Any]

# Why a model fails, where the cause is not the package.
CAUSES = {
    "timm.mobileone_s0": "random feedback makes the gradients explode in the first step; under bp, all stays finite",
    "torchvision.raft_small": "the model casts to float32 itself, so it has no gradients in float64",
}


def check(name: str, keep: Callable[[Result], object]) -> None:
    """Check one model, and call ``keep`` with the result after each part."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    plain = checks.without_dropout(model)
    result: Result = {"parameters": sum(p.numel() for p in plain.parameters())}

    def part(key: str, run: Callable[[], Any]) -> None:
        try:
            result[key] = run()
        except Exception as error:  # the finding of this part
            result[key] = {"error": f"{type(error).__name__}: {first_line(error)}"}
        keep(result)

    part("conversion", lambda: checks.conversion(plain))
    if not valid(result, "conversion").get("converted"):
        return
    part("influence", lambda: checks.influence(plain, inputs))
    part("through_weights", lambda: checks.weights_that_carry_gradients(plain, inputs))
    part("gradient_error", lambda: checks.gradient_error(plain, inputs))
    for rule in checks.STEP_RULES:
        part(f"step {rule}", lambda rule=rule: checks.step(plain, inputs, rule))


def check_compiled(name: str, keep: Callable[[Result], object]) -> None:
    """The same for the compiled model."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    plain = checks.without_dropout(model)
    try:
        keep({"compiled": checks.compiled_error(plain, inputs)})
    except Exception as error:  # the finding
        keep({"compiled": {"error": f"{type(error).__name__}: {first_line(error)}"}})


def first_line(error: Exception) -> str:
    """The first line of the message of an error that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


class Worker:
    """A process that checks one model after the other; another one takes its place if it crashes or is too slow."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def result(self, run: Callable, name: str, longest: float) -> Result:
        """The result of ``run(name, keep)``; what was kept and an error if the process ends or exceeds the time."""
        if self.process is None:
            context = multiprocessing.get_context("fork")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=serve, args=(end, self.pipe), daemon=True)
            self.process.start()
            end.close()
        start = time.monotonic()
        result: Result = {}
        error: str | None = f"no end within {longest} s"
        self.pipe.send((run, name))
        try:
            while self.pipe.poll(max(0.0, start + longest - time.monotonic())):
                found = self.pipe.recv()
                if found is None:
                    error = None
                    break
                result = found
        except (EOFError, ConnectionResetError):
            self.process.join()
            error = f"the process ended with exit code {self.process.exitcode}"
        if error is not None:
            result["error"] = error
            self.stop()
        return {**result, "seconds": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        """End the process; the next model gets another one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def serve(pipe: Connection, other_end: Connection) -> None:
    """Check the models whose names arrive, and send results while they grow, and then None."""
    other_end.close()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    while True:
        try:
            run, name = pipe.recv()
        except EOFError:  # all models are checked
            return
        try:
            run(name, pipe.send)
        except Exception as error:  # the model could not be built
            pipe.send({"error": f"{type(error).__name__}: {first_line(error)}"})
        pipe.send(None)


# Results


def versions() -> dict[str, str]:
    """The versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def keys(of: Mapping[str, str]) -> dict[str, str]:
    """What a result depends on, by package: the Python sources of pyfeedback, and the versions."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "pyfeedback").rglob("*.py")):
        found.update(path.read_bytes())
    return {p: f"{found.hexdigest()[:16]}, torch {of['torch']}, {p} {number}" for p, number in of.items()}


def faults(result: Result) -> list[str]:
    """What is wrong with a model, in words; empty if all checks passed."""
    found = [result["error"]] if "error" in result else []
    errors: dict[str, list[str]] = {}
    for key, value in result.items():
        if isinstance(value, dict) and "error" in value:
            errors.setdefault(value["error"], []).append(key)
    found += [f"{', '.join(parts)}: {error}" for error, parts in errors.items()]
    conversion, influence = (valid(result, key) for key in ("conversion", "influence"))
    if conversion and not conversion["converted"]:
        found.append("no layer is converted")
    if conversion and conversion["forgotten"]:
        found.append(f"neither converted nor reported: {listed(conversion['forgotten'])}")
    read = [name for name in through(result) if name.rpartition(".")[0] in conversion.get("converted", ())]
    if read:
        found.append(f"the layer is converted, but its weight carries gradients back: {listed(read)}")
    without = [name for name, why in influence["dead"].items() if why.startswith("NO")] if influence else []
    if without:
        found.append(f"the feedback weight has no influence: {listed(without)}")
    error = result.get("gradient_error")
    if isinstance(error, (list, tuple)) and not error[0] < checks.TOLERANCE:
        found.append(f"gradients differ from the reference by {error[0]:.0e} in {error[1]}")
    compiled = result.get("compiled")
    if isinstance(compiled, float) and not compiled < checks.TOLERANCE:
        found.append(f"compiled gradients differ from the eager ones by {compiled:.0e}")
    idle = set(influence["dead"]) if influence else set()
    for rule in checks.STEP_RULES:
        step = valid(result, f"step {rule}")
        if step:
            still = [name for name in step["still"] if name not in idle]
            if not (step["finite"] and all(map(math.isfinite, step["losses"]))):
                found.append(f"{rule}: a loss or parameter is not finite")
            if still:
                found.append(f"{rule}: feedback weights that learn did not move: {listed(still)}")
            if step["wrongly_moved"]:
                found.append(f"{rule}: fixed feedback weights moved: {listed(step['wrongly_moved'])}")
    return found


def valid(result: Result, key: str) -> dict[str, Any]:
    """A part of a result, or an empty dict if it is missing or an error."""
    value = result.get(key, {})
    return {} if "error" in value else value


def through(result: Result) -> list[str]:
    """The weights that carry gradients back."""
    names = result.get("through_weights")
    return names if isinstance(names, list) else []


def listed(names: list[str]) -> str:
    """The first of the names and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# The table


def table(results: Mapping[str, Result], of: Mapping[str, str]) -> str:
    """The page with one line for each model, failures first."""
    found = {name: faults(result) for name, result in results.items()}
    passed = sum(not f for f in found.values())
    partly = sum(not found[name] and bool(through(result)) for name, result in results.items())
    layers = sum(len(valid(result, "conversion").get("converted", ())) for result in results.values())
    compiled = [result["compiled"] for result in results.values() if "compiled" in result]
    same = sum(isinstance(error, float) and error < checks.TOLERANCE for error in compiled)
    lines = [
        "# Models of other packages",
        "",
        "Made by `make zoo`, which builds small models from their configuration (`tests/zoo/zoo_models.py`), without",
        "downloads, and checks that",
        "",
        "* every module with weights is converted, or left with a reason, and a NaN in a feedback weight reaches a",
        "  gradient,",
        "* no other weight carries gradients back in a product,",
        "* the gradients under ia are those of the reference in float64,",
        "* a step under each of fa, ia, kp and ia-probes is finite and moves the feedback weights that learn,",
        "* the gradients of the compiled model are the same (`torch.compile` with the backend aot_eager), where tried:",
        "  `python tests/zoo/zoo.py --compiled`.",
        "",
        "The results are in [models.json](models.json).",
        "",
        f"**{passed} of {len(results)} models pass**, {partly} of them with weights that carry gradients back as in",
        f"backprop. {layers} layers are converted. {same} of the {len(compiled)} models that were compiled have the",
        "same gradients.",
        "",
        "Versions: " + ", ".join(f"{package} {number}" for package, number in of.items()) + ".",
        "",
        "* **converted**: layers with a feedback path.",
        "* **idle**: converted, but without influence in this pass, and why. *Input* means that no input of the layer "
        "needs a gradient, *output* that no gradient reaches its output.",
        "* **left**: other modules with parameters of two or more dimensions. An embedding has no input gradient. "
        "*Other* ones, such as scales and position embeddings, are not multiplied with data in a product.",
        "* **through W**: weights that carry gradients back as in backprop.",
        "",
        "| model | package | converted | idle | left | through W | compiled | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in sorted(results.items(), key=lambda item: (not found[item[0]], list(MODELS).index(item[0]))):
        package, _, model = name.partition(".")
        conversion = valid(result, "conversion")
        weights = through(result)
        cells = [
            model, package, str(len(conversion.get("converted", ()))), idle_layers(result), left_layers(result),
            f"{len(weights)}: `{weights[0]}`" if weights else "",
            {float: "yes", dict: "**error**"}.get(type(result.get("compiled")), "not tried"),
            "<br>".join(filter(None, [*(f"**{f}**" for f in found[name]), CAUSES.get(name)])).replace("|", "\\|")
            or ("partly" if weights else "passed"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def idle_layers(result: Result) -> str:
    """How many converted layers had no influence, by reason."""
    words = {"its input needs no gradient": "input", "no gradient reaches its output": "output"}
    reasons = Counter(words.get(why, why) for why in valid(result, "influence").get("dead", {}).values())
    return ", ".join(f"{n} {why}" for why, n in reasons.items())


def left_layers(result: Result) -> str:
    """How many modules with weights were left, by reason."""
    owners = {name.rpartition(".")[0] for name in through(result)}
    kinds: Counter[str] = Counter()
    for name, why in valid(result, "conversion").get("left", {}).items():
        kind = why.partition(" has weights")[0] if name in owners else "other"
        kinds["embedding" if "embedding has no input gradient" in why else kind] += 1
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def main(arguments: list[str] | None = None) -> int:
    """Return the exit status: 1 if a model has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="names of models")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further model after this time")
    parser.add_argument("--again", action="store_true", help="check models whose results are up to date as well")
    parser.add_argument("--compiled", action="store_true", help="compile the models, and check only the result of that")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args(arguments)
    chosen = [n for n in MODELS if options.only is None or any(fnmatchcase(n, pattern) for pattern in options.only)]
    if not chosen:
        parser.error(f"no model is named {', '.join(options.only)}")
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    results: dict[str, Result] = {n: r for n, r in kept.get("models", {}).items() if n in MODELS}
    of, end = versions(), time.monotonic() + 60 * options.minutes
    key_of, worker = keys(of), Worker()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if not options.table:
        for package in of:
            __import__(package)  # once, before the processes are forked
    part, run, longest = "key", check, LONGEST
    if options.compiled:
        part, run, longest = "compiled key", check_compiled, LONGEST_COMPILATION
    for name in () if options.table else chosen:
        key, last = key_of.get(name.partition(".")[0]), results.get(name, {})
        is_done = last.get(part) == key and not options.again
        if is_done or key is None or time.monotonic() > end:
            continue
        found = worker.result(run, name, longest)
        seconds = found["seconds"]
        if options.compiled:
            worker.stop()  # a compiled model leaves much behind in its process
            error = {"error": found.get("error")}
            found = {**last, "compiled": found.get("compiled", error), "compiled seconds": seconds}
        else:
            found |= {k: value for k, value in last.items() if k.startswith("compiled")}
        results[name] = {**found, part: key}
        of_all = {name: results[name] for name in MODELS if name in results}
        KEPT.write_text(json.dumps({"versions": of, "models": of_all}, indent=1) + "\n")
        print(f"{name}: {'; '.join(faults(results[name])) or 'passed'} ({seconds})", flush=True)
    saved = json.loads(KEPT.read_text())
    TABLE.write_text(table(saved["models"], saved["versions"]))
    return int(any(faults(results[name]) for name in chosen if name in results))


if __name__ == "__main__":
    sys.exit(main())
