"""Measure the ceilings of the machine: the rate of a large copy and of a large matrix product.

python benchmarks/ceilings.py [--device cuda]
"""

import argparse
import statistics

import torch
from timing import Step, timer_for

ROUNDS = 20
WARM_UPS = 3


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy within the device, counting both reads and writes."""
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _median(Step(lambda: target.copy_(source)), device)


def product_rate(device: torch.device) -> float:
    """FLOP per second of a random matrix product: 8192^3 in bfloat16 on a GPU, 2048^3 in float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _median(Step(lambda: a @ b), device)


def measure(device: torch.device) -> dict[str, float]:
    """Both ceilings, in GB/s and TFLOP/s."""
    return {"copy_gb_s": copy_bandwidth(device) / 1e9, "product_tflop_s": product_rate(device) / 1e12}


def _median(step: Step, device: torch.device) -> float:
    timer = timer_for(device)
    times = [timer(step) for _ in range(WARM_UPS + ROUNDS)]
    return statistics.median(times[WARM_UPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found = measure(torch.device(parser.parse_args().device))
    print(f"copy {found['copy_gb_s']:.0f} GB/s, matrix product {found['product_tflop_s']:.1f} TFLOP/s")


if __name__ == "__main__":
    main()
