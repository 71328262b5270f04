"""Rates of fprop, dgrad and wgrad of a network's convolutions: cuDNN on a GPU, oneDNN on a CPU.

    python benchmarks/cudnn_rates.py --network resnet50 --batch 128 --dtype bfloat16 --out rates.json

The format is channels_last, cudnn.benchmark is on, and each time is the median of CUDA events after the L2 is flushed.
Convolutions with a 1x1 kernel and stride 1 are also measured as matrix products. "roof" is the fraction of the lower of
two measured ceilings: a large copy for the three tensors moved once, and a large matrix product for the multiply-adds.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator

import torch
from ceilings import measure
from machine import facts
from selection import DTYPES, NETWORKS
from timing import Clock, Race, Step, timer_for

from pyfeedback.testing import ConvShape, conv_inputs

PASSES = ("fprop", "dgrad", "wgrad")
_backward = torch.ops.aten.convolution_backward.default


def convolution(shape: ConvShape, x, w, dy) -> dict[str, Step]:
    """The three passes of a layer as PyTorch calls them."""
    stride, padding, dilation, groups = shape.window

    def grad(*mask: bool) -> Callable[[], object]:
        return lambda: _backward(dy, x, w, None, stride, padding, dilation, False, (0, 0), groups, mask)

    return {
        "fprop": Step(lambda: torch.conv2d(x, w, None, *shape.window)),
        "dgrad": Step(grad(True, False, False)),
        "wgrad": Step(grad(False, True, False)),
    }


def matrix_product(shape: ConvShape, x, w, dy) -> dict[str, Step]:
    """The three passes of a dense 1x1 layer as matrix products of [positions, channels]."""
    x, dy = (t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]) for t in (x, dy))
    w = w.reshape(w.shape[0], -1)
    return {
        "fprop": Step(lambda: torch.mm(x, w.t())),
        "dgrad": Step(lambda: torch.mm(dy, w)),
        "wgrad": Step(lambda: torch.mm(dy.t(), x)),
    }


def rates(
    shape: ConvShape, batch: int, dtype: torch.dtype, device: torch.device, rounds: int, ceilings
) -> Iterator[dict]:
    """One row for each pass and each method of computing it."""
    x, w, _, dy = (t.detach() for t in conv_inputs(shape, batch, dtype, device))
    flops = 2 * shape.macs * batch
    moved = (x.numel() + w.numel() + dy.numel()) * dtype.itemsize
    floor = max(flops / ceilings["product_tflop_s"] / 1e12, moved / ceilings["copy_gb_s"] / 1e9)
    ways = {"convolution": convolution}
    if shape.kernel == shape.stride == shape.groups == 1:
        ways["matrix product"] = matrix_product
    for way, make in ways.items():
        race = Race(make(shape, x, w, dy), PASSES[0], timer_for(device), Clock())
        race.warm_up(3)
        for _ in range(rounds):
            race.round()
        for name in PASSES:
            seconds = race.median(name)
            yield {
                "layer": shape.name, "count": shape.repeats, "pass": name, "way": way, "seconds": seconds,
                "tflop_s": flops / seconds / 1e12, "gb_s": moved / seconds / 1e9, "roof": floor / seconds,
            }  # fmt: skip


def table(rows: list[dict]) -> Iterator[str]:
    """Lines with microseconds, TFLOP/s and the fraction of the roof for the three passes of each layer."""
    yield f"{'layer':22}{'':>3}{'way':>16}" + "".join(f"{name + ' us':>12}{'TFLOP/s':>9}{'roof':>6}" for name in PASSES)
    for layer, way in dict.fromkeys((r["layer"], r["way"]) for r in rows):
        found = {r["pass"]: r for r in rows if (r["layer"], r["way"]) == (layer, way)}
        cells = (
            f"{1e6 * found[p]['seconds']:12.1f}{found[p]['tflop_s']:9.2f}{found[p]['roof']:6.2f}" if p in found else ""
            for p in PASSES
        )
        count = next(iter(found.values()))["count"]
        yield f"{layer:22}x{count:<2}{way:>16}" + "".join(cells)
    total = {
        p: sum(r["count"] * r["seconds"] for r in rows if (r["pass"], r["way"]) == (p, "convolution")) for p in PASSES
    }
    yield f"{'all, by count':41}" + "".join(f"{1e6 * total[p]:12.1f}{'':15}" for p in PASSES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet50")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="seconds after which no further layer is measured"
    )
    parser.add_argument("--out", help="JSON file of the results")
    options = parser.parse_args()
    device, started = torch.device(options.device), time.monotonic()
    torch.backends.cudnn.benchmark = True
    ceilings, rows = measure(device), []
    for shape in NETWORKS[options.network]:
        if time.monotonic() - started < options.time_limit:
            rows += rates(shape, options.batch, DTYPES[options.dtype], device, options.rounds, ceilings)
    print(f"copy {ceilings['copy_gb_s']:.0f} GB/s, matrix product {ceilings['product_tflop_s']:.1f} TFLOP/s")
    print("\n".join(table(rows)))
    if options.out:
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        with open(options.out, "w") as file:
            json.dump(
                {"machine": facts(device), "settings": settings, "ceilings": ceilings, "rates": rows}, file, indent=1
            )
            file.write("\n")


if __name__ == "__main__":
    main()
