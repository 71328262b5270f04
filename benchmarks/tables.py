"""The summary of a run: tables of ratios from the benchmark records."""

import math
import statistics
from collections.abc import Iterable

import numpy as np
from implementations import BASELINES, SUBJECT
from selection import NETWORKS, RULES, WHOLE_NETWORKS

from pyfeedback import Rule

Record = dict
RUN = 10_000  # steps of a run with probes
USUAL = ("eager", "channels_last", "float32")  # not in the title of a row
TITLES = {name: name for name in BASELINES} | {"plain": "backprop"}


def report(records: list[Record], per_layer: bool = False) -> list[str]:
    """Every table for which the records have data. A ratio below 1 is faster than the implementation of the column."""
    lines: list[str] = []
    layers = [r for r in records if r["kind"] == "layer"]
    for dtype in _distinct(r["dtype"] for r in layers):
        of_dtype = [r for r in layers if r["dtype"] == dtype]
        for network in NETWORKS:
            lines += _network_table(network, dtype, of_dtype)
        if per_layer:
            lines += _layer_table(dtype, of_dtype)
    lines += _network_steps([r for r in records if r["kind"] == "network"])
    probes = [r for r in records if r["kind"] == "probes"]
    for network, shapes in NETWORKS.items():
        measured = len({r["layer"] for r in probes} & {shape.name for shape in shapes})
        title = f"{network}, {measured} of its {len(shapes)} distinct layers by count"
        lines += _probe_steps(title, {shape.name: shape.repeats for shape in shapes}, probes)
    for network in WHOLE_NETWORKS:
        lines += _probe_steps(f"all of {network}", {network: 1}, probes)
    lines += _peers([r for r in records if r["kind"] == "peer"])
    lines += _updates([r for r in records if r["kind"] == "update"])
    lines += _optimizers([r for r in records if r["kind"] == "optimizer"])
    lines += _alignments([r for r in records if r["kind"] == "alignment"])
    lines += _overheads([r for r in records if r["kind"] == "overhead"])
    lines += _whole_steps(records)
    return lines


def weighted_ratio(records: Iterable[Record], counts: dict[str, int], other: str) -> float:
    """Time of all layers of a network, weighted by their number of occurrences, relative to another implementation."""
    mine = theirs = 0.0
    for record in records:
        seconds = counts[record["layer"]] * record["seconds"][other]
        mine += record[f"ratio_to_{other}"] * seconds
        theirs += seconds
    return mine / theirs


def _network_table(network: str, dtype: str, records: list[Record]) -> list[str]:
    counts = {shape.name: shape.repeats for shape in NETWORKS[network]}
    here = [r for r in records if r["layer"] in counts]
    if not here:
        return []
    others = [name for name in BASELINES if any(f"ratio_to_{name}" in r for r in here)]
    measured = len({r["layer"] for r in here})
    kind = "backward" if here[0]["backward_only"] else "forward and backward"
    width = 11 * len(others)
    lines = [
        f"{network}, {measured} of its {len(counts)} distinct layers, batch {here[0]['batch']}, {dtype}: {kind}",
        f"  {'':6}{'median of layers':>{width}}   {'all layers, by count':>{width}}",
        f"  {'rule':6}" + "   ".join(2 * ["".join(f"{TITLES[o]:>11}" for o in others)]),
    ]
    for rule in _distinct(r["rule"] for r in here):
        of_rule = [r for r in here if r["rule"] == rule]
        medians, totals = [], []
        for other in others:
            having = [r for r in of_rule if f"ratio_to_{other}" in r]
            medians.append(statistics.median(r[f"ratio_to_{other}"] for r in having) if having else None)
            totals.append(weighted_ratio(having, counts, other) if having else None)
        lines.append(f"  {rule:6}{_cells(medians)}   {_cells(totals)}")
    return [*lines, ""]


def _layer_table(dtype: str, records: list[Record]) -> list[str]:
    rules = _distinct(r["rule"] for r in records)
    lines = []
    for other in BASELINES:
        found = {(r["layer"], r["rule"]): r[f"ratio_to_{other}"] for r in records if f"ratio_to_{other}" in r}
        if found:
            lines.append(f"each layer relative to {TITLES[other]}, {dtype}")
            lines.append(f"  {'layer':22}{'ms':>9}" + "".join(f"{rule:>7}" for rule in rules))
            for layer in _distinct(r["layer"] for r in records):
                having = [r["seconds"][other] for r in records if r["layer"] == layer and other in r["seconds"]]
                cells = _cells([found.get((layer, rule)) for rule in rules], 7)
                lines.append(f"  {layer:22}{1e3 * statistics.median(having):9.3f}{cells}")
            lines.append("")
    return lines


def floors(records: list[Record], copy_gb_s: float, product_tflop_s: float) -> list[str]:
    """Each layer and rule against the lower bound of its bytes and operations at the rates measured in the same run."""
    names = [name for name in ("pyfeedback", "composed", "triton") if any(name in r["seconds"] for r in records)]
    lines = [f"microseconds of each layer  {'':18}{'floor':>9}" + "".join(f"{name:>12}" for name in names)]
    for r in records:
        floor = max(r["bytes"] / (1e9 * copy_gb_s), r["flops"] / (1e12 * product_tflop_s))
        cells = "".join(f"{1e6 * r['seconds'][n]:12.1f}" if n in r["seconds"] else f"{'-':>12}" for n in names)
        lines.append(f"  {r['layer']:22} {r['rule']:6} {r['dtype']:14}{1e6 * floor:9.1f}{cells}")
    return [*lines, ""]


def _network_steps(records: list[Record]) -> list[str]:
    lines = []
    for row in _distinct(map(_step_of, records)):
        here = [r for r in records if _step_of(r) == row]
        milliseconds = 1e3 * statistics.median(r["seconds"]["plain"] for r in here)
        megabytes = here[0]["peak_bytes"]["plain"] / 1e6
        lines.append(f"step of {', '.join(row)}: backprop {milliseconds:.1f} ms, {megabytes:.0f} MB")
        lines.append(f"  {'':24}" + "".join(f"{r['rule']:>7}" for r in here))
        for other in ("plain", "reference"):
            if any(other in r["seconds"] for r in here):
                times = [r.get(f"ratio_to_{other}") for r in here]
                lines.append(f"  {f'time to {TITLES[other]}':24}{_cells(times, 7)}")
                peaks = [_ratio(r["peak_bytes"], other) for r in here]
                lines.append(f"  {f'memory to {TITLES[other]}':24}{_cells(peaks, 7)}")
        lines.append(f"  {'multiply-adds':24}{_cells([r['multiply_adds'] for r in here], 7)}")
        if any("followed" in r["seconds"] for r in here):
            pairs = [(r["ratio_to_plain"], r.get("ratio_to_followed")) for r in here]
            times = [plain / followed if followed else None for plain, followed in pairs]
            lines.append(f"  {'followed, to backprop':24}{_cells(times, 7)}")
        lines.append("")
    return lines


def _probe_steps(title: str, counts: dict[str, int], records: list[Record]) -> list[str]:
    """Training steps of all layers by count, or of a network, relative to backprop, at several ages of a run.

    Estimates are not made in every step. The times of steps with and without one are weighted by their frequency.
    """
    here = [r for r in records if r["layer"] in counts]
    if not here:
        return []
    ages = here[0]["ages"]
    means = [age for age in ages if age >= RUN]
    lines = [
        f"{title}, batch {here[0]['batch']}: steps with the optimizer, relative to backprop",
        f"  {'rule':12}{'no estimate':>13}"
        + "".join(f"{f'step {age:,}':>14}" for age in ages)
        + "".join(f"{f'mean to {age:,}':>17}" for age in means),
    ]
    for rule in _distinct(r["rule"] for r in here):
        of_rule = [r for r in here if r["rule"] == rule]
        totals: dict[str, float] = {}
        for record in of_rule:
            for name, seconds in record["seconds"].items():
                totals[name] = totals.get(name, 0.0) + counts[record["layer"]] * seconds
        without = weighted_ratio(of_rule, counts, "plain")
        estimates = _estimates(totals)
        at_ages = [without + estimates[age] / RULES[rule].every_at(age) for age in ages]
        run = [_mean_of_run(RULES[rule], without, estimates, age) for age in means]
        lines.append(f"  {rule:12}" + _cells([without], 13) + _cells(at_ages, 14) + _cells(run, 17))
    return [*lines, ""]


def _estimates(seconds: dict[str, float]) -> dict[int, float]:
    """The time of an estimate at each age, relative to a step of backprop."""
    return {int(age): (seconds[age] - seconds["update"]) / seconds["plain"] for age in seconds if age.isdigit()}


def _mean_of_run(rule: Rule, without: float, estimates: dict[int, float], steps: int) -> float:
    """The mean time of a step over a run with probes, relative to backprop.

    The logarithm of the time of an estimate is linear in that of the age, in between the ages at which it was measured.

    Args:
        without: the time of a step without an estimate.
        estimates: that of an estimate, by age.
    """
    logarithms = [math.log(max(estimate, 1e-9)) for estimate in estimates.values()]
    due = [step for step in range(steps) if step % rule.every_at(step) == 0]
    total = np.exp(np.interp(np.log(np.maximum(due, 1)), np.log(list(estimates)), logarithms)).sum()
    return without + total / steps


def _step_of(record: Record) -> tuple[str, ...]:
    """What a whole training step is, but for its rule."""
    return tuple(record[name] for name in ("network", "mode", "layout", "size", "dtype"))


def whole_steps(records: list[Record]) -> dict[tuple[str, ...], dict[str, float]]:
    """The time of each whole training step relative to backprop, by network, mode, layout, size and dtype, and by rule.

    That of rules that read probes is the mean over a run of ``RUN`` steps.
    """
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for r in records:
        if r["kind"] == "network":
            found.setdefault(_step_of(r), {})[r["rule"]] = r["ratio_to_plain"]
        elif r["kind"] == "probes" and "network" in r:
            run = _mean_of_run(RULES[r["rule"]], r["ratio_to_plain"], _estimates(r["seconds"]), RUN)
            found.setdefault(_step_of(r), {})[r["rule"]] = run
    return found


def _whole_steps(records: list[Record]) -> list[str]:
    found = whole_steps(records)
    if not found:
        return []
    rules = [name for name in RULES if any(name in ratios for ratios in found.values())]
    widths = [max(7, len(name) + 2) for name in rules]
    titles = {step: ", ".join((step[0], *(part for part in step[1:] if part not in USUAL))) for step in found}
    first = max(map(len, titles.values()))
    lines = [f"time of a whole training step relative to backprop; with probes, the mean over {RUN:,} steps"]
    lines.append(f"  {'':{first}}" + "".join(f"{name:>{width}}" for name, width in zip(rules, widths, strict=True)))
    for step, title in sorted(titles.items(), key=lambda each: WHOLE_NETWORKS.index(each[0][0])):
        cells = "".join(_cells([found[step].get(name)], width) for name, width in zip(rules, widths, strict=True))
        lines.append(f"  {title:{first}}{cells}")
    return [*lines, ""]


def _peers(records: list[Record]) -> list[str]:
    if not records:
        return []
    lines = ["a training step by pyfeedback relative to BioTorch's, and to backprop"]
    lines.append(f"  {'':44}{'BioTorch':>17}{'backprop':>17}")
    lines.append(f"  {'':44}{2 * f'{chr(32):4}time  memory'}")
    for r in records:
        title = f"{r['network']}, {r['rule']}, batch {r['batch']}, {r['layout']}"
        cells = [c for o in ("biotorch", "plain") for c in (r[f"ratio_to_{o}"], _ratio(r["peak_bytes"], o))]
        milliseconds = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in r["seconds"].items())
        lines.append(f"  {title:44}" + "".join(f"{c:8.2f}" for c in cells) + f"   ms: {milliseconds}")
    return [*lines, ""]


def _ratio(peaks: dict[str, int], other: str) -> float | None:
    return peaks[SUBJECT] / peaks[other] if other in peaks else None


def _updates(records: list[Record]) -> list[str]:
    if not records:
        return []
    lines = [f"{'feedback_step_':38}{'us':>10}{'GB/s':>8}{'to _foreach':>13}"]
    for r in records:
        title = f"{r['tensors']} x {r['sizes']}, {r['rule']}, momentum {r['momentum']}"
        mine = r["seconds"]["pyfeedback"]
        lines.append(f"  {title:36}{1e6 * mine:10.1f}{r['bytes'] / mine / 1e9:8.1f}{r['ratio_to_foreach']:13.2f}")
    return [*lines, ""]


def _optimizers(records: list[Record]) -> list[str]:
    lines = []
    for name, dtype in _distinct((r["optimizer"], r["dtype"]) for r in records):
        here = [r for r in records if (r["optimizer"], r["dtype"]) == (name, dtype)]
        others = [other for other in here[0]["seconds"] if other != "pyfeedback"]
        title = f"{name} of ResNet-50, {dtype}"
        lines.append(f"{title:24}{'ms':>10}" + "".join(f"{'to ' + other:>16}" for other in others))
        for r in here:
            ratios = _cells([r[f"ratio_to_{other}"] for other in others], 16)
            lines.append(f"  {r['rule']:22}{1e3 * r['seconds']['pyfeedback']:10.2f}{ratios}")
        lines.append("")
    return lines


def _alignments(records: list[Record]) -> list[str]:
    if not records:
        return []
    lines = [f"{'alignment of ResNet-50':38}{'ms':>10}{'GB/s':>8}{'to float64 loop':>17}{'to plain loop':>15}"]
    for r in records:
        mine, title = r["seconds"]["pyfeedback"], f"{r['dtype']}, {r['layout']}"
        ratios = f"{r['ratio_to_float64 loop']:17.2f}{r['ratio_to_plain loop']:15.2f}"
        lines.append(f"  {title:36}{1e3 * mine:10.2f}{r['bytes'] / mine / 1e9:8.1f}{ratios}")
    return [*lines, ""]


def _overheads(records: list[Record]) -> list[str]:
    lines = []
    for layer in _distinct(r["layer"] for r in records):
        here = [r for r in records if r["layer"] == layer]
        plain = statistics.median(r["seconds"]["plain"] for r in here if not r["optimizer"])
        lines.append(
            f"step of {layer}, one thread: plain {1e6 * plain:.1f} us; * with an optimizer's step, as in plain"
        )
        more = (1e6 * r["seconds"]["plain"] * (r["ratio_to_plain"] - 1) for r in here)
        lines.append(" " * 17 + "".join(f"{r['rule'] + '*' * r['optimizer']:>8}" for r in here))
        lines.append(f"{'  relative to it':17}" + "".join(f"{r['ratio_to_plain']:8.2f}" for r in here))
        lines += [f"{'  more, us':17}" + "".join(f"{value:8.1f}" for value in more), ""]
    return lines


def _cells(values: Iterable[float | None], width: int = 11) -> str:
    return "".join(f"{'-':>{width}}" if value is None else f"{value:{width}.2f}" for value in values)


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))
