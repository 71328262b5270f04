"""The tables and the figure of transformer_study.py, from the runs that are done."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from depth_study_report import markdown
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from picture import STYLES
from study_figures import LOOK
from transformer_runs import Job, Outcome
from two_routes import TITLES

MODELS = {"gpt": "Character GPT", "vit": "Vision Transformer"}
LOSSES = {"gpt": "test loss (nats per character)", "vit": "test loss (nats per image)"}
NAMES = {  # of the layers, by the end of their path
    "attention": "queries, keys, values", "out_proj": "attention output", "mlp.0": "MLP, first", "mlp.2": "MLP, second",
    "head": "head",
}  # fmt: skip

Results = Mapping[Job, Outcome]


def write(searched: Results, results: Results, out: Path) -> None:
    """Write results.md and, if there is a finished test run, loss.png and loss.svg."""
    (out / "results.md").write_text(page(searched, results))
    if results:
        draw(results, out)


def page(searched: Results, results: Results) -> str:
    """All tables in Markdown."""
    parts = ["# Results of the transformers\n", "Made by `python examples/transformer_study.py --report`.\n"]
    for model, heading in MODELS.items():
        if by_label(results, model):
            parts += [f"## {heading}\n", table(results, model), "Angle by layer, in degrees:\n", angles(results, model)]
    if searched:
        parts += ["## Validation loss of kp by time constant\n", search(searched)]
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
    with plt.rc_context(LOOK | {"svg.hashsalt": "pyfeedback"}):
        figure, panels = plt.subplots(1, len(MODELS), figsize=(7.2, 3.8), layout="constrained")
        for axes, (model, heading) in zip(panels, MODELS.items(), strict=True):
            runs = by_label(results, model)
            if runs:
                _panel(axes, runs, baseline(results, model))
            axes.set(xlabel="step", ylabel=LOSSES[model])
            axes.set_title(heading, loc="left", fontsize=9)
        handles = [plt.Line2D([], [], label=_name(job), **_line(job)) for job in jobs.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(out / f"loss{suffix}", metadata=metadata)
        plt.close(figure)


def _panel(axes: Axes, runs: Mapping[str, Mapping[Job, Outcome]], no_input: float) -> None:
    """A line for each rule, the mean over the seeds, with a band of one standard deviation."""
    last = 0
    for found in runs.values():
        job, last = next(iter(found)), max(last, *(job.steps for job in found))
        curves = list(zip(*(outcome.loss for outcome in found.values()), strict=False))
        at = [job.steps // job.measurements * i for i in range(len(curves))]
        means = [statistics.fmean(values) for values in curves]
        halves = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curves]
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.plot(at, means, **_line(job))
        axes.fill_between(at, low, high, color=_line(job)["color"], alpha=0.2, linewidth=0)
    axes.axhline(no_input, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.text(last, 1.01 * no_input, "no input", color="#808080", ha="right", va="bottom", fontsize=8)
    axes.set(xlim=(0, last), ylim=(None, 1.12 * no_input))


def _name(job: Job) -> str:
    tau = f", tau {job.tau:g}" if job.tau else ""
    return f"{job.rule}  {TITLES[job.rule.partition('-')[0]]}{tau}"


def _line(job: Job) -> dict:
    """The color and the dash of a rule. A second time constant of kp has a solid line."""
    color, dash = STYLES[job.rule.partition("-")[0]]
    return {"color": color, "linestyle": dash}
