"""The tables and the figure of transformer_study.py, from the runs that are done."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from demo_figure import STYLES
from depth_study_report import markdown
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from study_figures import LOOK
from transformer_runs import Job, Outcome
from two_routes import TITLES

MODELS = {"gpt": "Character GPT", "vit": "Vision Transformer"}
LOSSES = {"gpt": "test loss (nats per character)", "vit": "test loss (nats per image)"}
DOTTED = (0, (1, 1))
NAMES = {  # of the layers, by the end of their path
    "attention": "queries, keys, values", "out_proj": "attention output", "mlp.0": "MLP, first", "mlp.2": "MLP, second",
    "head": "head",
}  # fmt: skip

Results = Mapping[Job, Outcome]


def write(results: Results, searched: Results, small: Results, out: Path) -> None:
    """Write results.md and, if there is a finished test run, loss.png and loss.svg.

    Args:
        results: the test runs.
        searched: the validation runs of kp.
        small: the test runs with small initial weights.
    """
    (out / "results.md").write_text(page(results, searched, small))
    if results:
        draw(results, out)


def page(results: Results, searched: Results, small: Results) -> str:
    """All tables in Markdown."""
    parts = ["# Results of the transformers\n", "Made by `python examples/transformer_study.py --report`.\n"]
    for model, heading in MODELS.items():
        if by_label(results, model):
            parts += [f"## {heading}\n", table(results, model), "Angle by layer, in degrees:\n", angles(results, model)]
    if searched:
        parts += ["## Validation loss of kp by time constant\n", search(searched)]
    if small:
        parts += ["## Test loss with small initial weights (seed 0)\n", starts(results, small)]
    return "\n".join(parts)


def by_label(results: Results, model: str) -> dict[str, dict[Job, Outcome]]:
    """The runs of a model, by rule and time constant."""
    found: dict[str, dict[Job, Outcome]] = {}
    for job, outcome in results.items():
        if job.model == model:
            found.setdefault(job.label, {})[job] = outcome
    return found


def table(results: Results, model: str) -> str:
    """One line for each rule: mean and standard deviation over the seeds, and the gap to bp, paired by seed."""
    found = by_label(results, model)
    loss = LOSSES[model].replace(" (", ", ").removesuffix(")")
    lines = [["rule", loss, "behind bp", "test accuracy (%)", "behind bp", "angle (degrees)", "seeds"], ["---"] * 7]
    bp = {job.seed: outcome for job, outcome in found.get("bp", {}).items()}
    for label, runs in found.items():
        pairs = [(outcome, bp[job.seed]) for job, outcome in runs.items() if job.seed in bp and label != "bp"]
        outcomes = list(runs.values())
        lines.append([
            label,
            spread([o.loss[-1] for o in outcomes], 3),
            spread([o.loss[-1] - b.loss[-1] for o, b in pairs], 3),
            spread([o.accuracy[-1] for o in outcomes], 1),
            spread([b.accuracy[-1] - o.accuracy[-1] for o, b in pairs], 1),
            spread([statistics.fmean(o.angles.values()) for o in outcomes if o.angles], 1),
            str(len(outcomes)),
        ])  # fmt: skip
    lines.append(["no input", f"{baseline(results, model):.3f}", *[""] * 5])
    return markdown(lines)


def baseline(results: Results, model: str) -> float:
    """The loss of a model without input."""
    return next(outcome.baseline for job, outcome in results.items() if job.model == model)


def search(searched: Results) -> str:
    """The losses of both models by the time constant of kp."""
    taus = sorted({job.tau for job in searched})
    lines = [["tau (steps)", *(f"{tau:g}" for tau in taus)], ["---"] * (1 + len(taus))]
    for model, heading in MODELS.items():
        losses = {job.tau: f"{outcome.loss[-1]:.3f}" for job, outcome in searched.items() if job.model == model}
        lines.append([heading, *(losses.get(tau, "") for tau in taus)])
    return markdown(lines)


def starts(results: Results, small: Results) -> str:
    """The losses with usual and with small initial weights, and the mean angle."""
    lines = [["rule", "initial weights", *(f"{heading}, angle" for heading in MODELS.values())], ["---"] * 4]
    usual = {replace(job, start=1.0) for job in small}
    for label in dict.fromkeys(job.label for job in small):
        for runs, start in ((results, "usual"), (small, "a tenth")):
            found = {job.model: runs[job] for job in runs if job.label == label and replace(job, start=1.0) in usual}
            lines.append([label, start, *(_cell(found.get(model)) for model in MODELS)])
    return markdown(lines)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    angle = f", {statistics.fmean(outcome.angles.values()):.1f}°" if outcome.angles else ""
    return f"{outcome.loss[-1]:.3f}{angle}"


def angles(results: Results, model: str) -> str:
    """The mean angle of each kind of layer, over blocks and seeds."""
    lines = [["rule", *NAMES.values()], ["---"] * (1 + len(NAMES))]
    for label, runs in by_label(results, model).items():
        layers = [item for outcome in runs.values() for item in outcome.angles.items()]
        if layers:
            means = [statistics.fmean(angle for name, angle in layers if name.endswith(end)) for end in NAMES]
            lines.append([label, *(f"{mean:.1f}" for mean in means)])
    return markdown(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; only the mean of one value, and nothing without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def draw(results: Results, out: Path) -> None:
    """Write the test loss against the step, with a panel for each model, as PNG and SVG."""
    jobs = {job.label: job for job in results}
    largest = {job.rule: max(other.tau for other in results if other.rule == job.rule) for job in results}
    lines = {label: _line(job, compared=job.tau < largest[job.rule]) for label, job in jobs.items()}
    with plt.rc_context(LOOK | {"svg.hashsalt": "pyfeedback"}):
        figure, panels = plt.subplots(1, len(MODELS), figsize=(7.2, 3.8), layout="constrained")
        for axes, (model, heading) in zip(panels, MODELS.items(), strict=True):
            runs = by_label(results, model)
            if runs:
                _panel(axes, runs, lines, baseline(results, model))
            axes.set(xlabel="step", ylabel=LOSSES[model])
            axes.set_title(heading, loc="left", fontsize=9)
        handles = [plt.Line2D([], [], label=_name(job), **lines[label]) for label, job in jobs.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(out / f"loss{suffix}", metadata=metadata)
        plt.close(figure)


def _panel(axes: Axes, runs: Mapping[str, Mapping[Job, Outcome]], lines: Mapping[str, dict], no_input: float) -> None:
    """A line for each rule, the mean over the seeds, with a band of one standard deviation."""
    last = 0
    for label, found in runs.items():
        job, last = next(iter(found)), max(last, *(job.steps for job in found))
        curves = list(zip(*(outcome.loss for outcome in found.values()), strict=False))
        at = [job.steps // job.measurements * i for i in range(len(curves))]
        means = [statistics.fmean(values) for values in curves]
        halves = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curves]
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.plot(at, means, **lines[label])
        axes.fill_between(at, low, high, color=lines[label]["color"], alpha=0.2, linewidth=0)
    axes.axhline(no_input, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.text(last, 1.01 * no_input, "no input", color="#808080", ha="right", va="bottom", fontsize=8)
    axes.set(xlim=(0, last), ylim=(None, 1.12 * no_input))


def _name(job: Job) -> str:
    tau = f", tau {job.tau:g}" if job.tau else ""
    return f"{job.rule}  {TITLES[job.rule.partition('-')[0]]}{tau}"


def _line(job: Job, compared: bool) -> dict:
    """The color and the dash of a rule; dotted with the smaller one of two time constants."""
    color, dash = STYLES[job.rule.partition("-")[0]]
    return {"color": color, "linestyle": DOTTED if compared else dash}
