"""Peak memory of a whole training step under each rule, relative to backprop and to the reference.

    python benchmarks/memory.py --network resnet50 --batch 32      # on a CPU or a GPU

The count is the peak of PyTorch's allocator in the first step, without the model, its feedback and the images:
activations, gradients, temporaries and the state of the optimizer. float32, channels_last.
"""

import argparse

import torch
from networks import MODELS, SIZES, draw_batch, reference_step, training_step
from selection import RULES

import pyfeedback
from pyfeedback.testing import peak_bytes


def peak(network: str, rule: str, batch: int, size: int, device: torch.device, make_step=training_step) -> int:
    """Peak bytes of the first step."""
    torch.manual_seed(0)
    model = pyfeedback.convert(MODELS[network]().to(device, memory_format=torch.channels_last), RULES[rule])
    inputs, labels = (t.to(device) for t in draw_batch(network, batch, size))
    if inputs.dim() == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    return peak_bytes(make_step(model, inputs, labels).run, device)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", choices=list(MODELS), default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--size", type=int, help="height and width of the images, or length of the texts (default: as in networks.py)"
    )
    parser.add_argument("--rule", action="append", choices=list(RULES), help="default: every rule on the whole batch")
    parser.add_argument(
        "--without-reference", action="store_true", help="skip the reference, which takes most of the time"
    )
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = options.size or SIZES[options.network][0][1]
    what = (options.batch, size, device)
    backprop = peak(options.network, "bp", *what)
    print(f"{options.network}, batch {options.batch} of {size}, {device.type}: {backprop / 1e6:.0f} MB")
    print(f"{'rule':8}{'MB':>8}{'to backprop':>13}{'to reference':>14}")
    for rule in options.rule or ("fa", "sa", "kp", "wm", "ia", "aa"):
        ours, line = peak(options.network, rule, *what), ""
        if RULES[rule].learns and not options.without_reference:
            line = f"{ours / peak(options.network, rule, *what, reference_step):14.2f}"
        print(f"{rule:8}{ours / 1e6:8.0f}{ours / backprop:13.3f}{line}", flush=True)


if __name__ == "__main__":
    main()
