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

Results = Mapping[tuple[str, str], Mapping[Job, Outcome]]  # by model and rule


def write(results: Results, out: Path) -> None:
    """Write results.md and, if there is a finished run, loss.png and loss.svg."""
    (out / "results.md").write_text(page(results))
    if any(results.values()):
        draw(results, out)


def page(results: Results) -> str:
    """The tables of all models in Markdown."""
    parts = ["# Results of the transformers\n", "Made by `python examples/transformer_study.py --report`.\n"]
    for model, heading in MODELS.items():
        if any(results[found] for found in results if found[0] == model):
            parts += [f"## {heading}\n", table(results, model), "Angle by layer, in degrees:\n", angles(results, model)]
    return "\n".join(parts)


def table(results: Results, model: str) -> str:
    """One line for each rule: mean and standard deviation over the seeds, and the gap to bp, paired by seed."""
    title = LOSSES[model].removesuffix(")").replace("test loss (", "test loss, ")
    lines = [["rule", title, "behind bp", "test accuracy (%)", "behind bp", "angle (degrees)", "seeds"], ["---"] * 7]
    bp = {job.seed: outcome for job, outcome in results.get((model, "bp"), {}).items()}
    for name, found in _of(results, model).items():
        pairs = [(outcome, bp[job.seed]) for job, outcome in found.items() if job.seed in bp and name != "bp"]
        outcomes = list(found.values())
        lines.append([
            name,
            spread([o.loss[-1] for o in outcomes], 3),
            spread([o.loss[-1] - b.loss[-1] for o, b in pairs], 3),
            spread([o.accuracy[-1] for o in outcomes], 1),
            spread([b.accuracy[-1] - o.accuracy[-1] for o, b in pairs], 1),
            spread([statistics.fmean(o.angles.values()) for o in outcomes if o.angles], 1),
            str(len(outcomes)),
        ])  # fmt: skip
    baseline = next(iter(next(iter(_of(results, model).values())).values())).baseline
    lines.append(["no input", f"{baseline:.3f}", *[""] * 5])
    return markdown(lines)


def angles(results: Results, model: str) -> str:
    """The mean angle of each kind of layer, over blocks and seeds."""
    lines = [["rule", *NAMES.values()], ["---"] * (1 + len(NAMES))]
    for name, found in _of(results, model).items():
        layers = [item for outcome in found.values() for item in outcome.angles.items()]
        if layers:
            means = [statistics.fmean(a for layer, a in layers if layer.endswith(end)) for end in NAMES]
            lines.append([name, *(f"{mean:.1f}" for mean in means)])
    return markdown(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; only the mean of one value, and nothing without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def draw(results: Results, out: Path) -> None:
    """Write the test loss against the step, with a panel for each model, as PNG and SVG."""
    names = list(dict.fromkeys(rule for (_, rule), found in results.items() if found))
    with plt.rc_context(LOOK | {"svg.hashsalt": "pyfeedback"}):
        figure, panels = plt.subplots(1, len(MODELS), figsize=(7.2, 3.6), layout="constrained")
        for axes, (model, heading) in zip(panels, MODELS.items(), strict=True):
            _panel(axes, results, model)
            axes.set_title(heading, loc="left", fontsize=9)
        handles = [plt.Line2D([], [], label=f"{name}  {TITLES[_short(name)]}", **_line(name)) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
        for suffix, metadata in ((".png", {}), (".svg", {"Date": None})):
            figure.savefig(out / f"loss{suffix}", metadata=metadata)
        plt.close(figure)


def _panel(axes: Axes, results: Results, model: str) -> None:
    """A line for each rule, the mean over the seeds, with a band of one standard deviation."""
    baseline, last = None, 0.0
    for name, found in _of(results, model).items():
        job, outcome = next(iter(found.items()))
        baseline, last = outcome.baseline, job.steps
        every = job.steps // job.measurements
        curves = list(zip(*(o.loss for o in found.values()), strict=False))
        at = [every * i for i in range(len(curves))]
        means = [statistics.fmean(values) for values in curves]
        halves = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curves]
        low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
        axes.plot(at, means, **_line(name))
        axes.fill_between(at, low, high, color=_line(name)["color"], alpha=0.2, linewidth=0)
    if baseline is not None:
        axes.axhline(baseline, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.text(last, 1.01 * baseline, "no input", color="#808080", ha="right", va="bottom", fontsize=8)
        axes.set(xlim=(0, last), ylim=(None, 1.15 * baseline))
    axes.set(xlabel="step", ylabel=LOSSES[model])


def _of(results: Results, model: str) -> dict[str, Mapping[Job, Outcome]]:
    """The runs of a model that are done, by rule."""
    return {rule: found for (of, rule), found in results.items() if of == model and found}


def _short(name: str) -> str:
    return name.partition("-")[0]


def _line(name: str) -> dict:
    color, dash = STYLES[_short(name)]
    return {"color": color, "linestyle": dash}
