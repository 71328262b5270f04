"""Train a network by any rule of pyfeedback.

    python examples/train.py digits-ia                              # a named configuration; --list shows them
    python examples/train.py cifar10 --rule sa --out runs/sa        # another rule
    python examples/train.py cifar10 --rule "10.*=bp" "*=kp"        # a rule for each layer name pattern
    python examples/train.py runs/sa/settings.json --seed 1         # the settings of another run
    torchrun --nproc-per-node 4 examples/train.py imagenet-kp --root /data/imagenet --autocast --channels-last

The folder --out receives metrics.csv, alignment.csv, alignment.png, settings.json and checkpoint.pt. To continue an
interrupted run from its last checkpoint, add --resume to the same command. On a CPU, the results are then bit for bit
those of an uninterrupted run.
"""

import argparse
from contextlib import contextmanager

from training import checkpoint, command_line, data, device
from training.logs import Logs
from training.loop import Run
from training.settings import Settings


def main() -> None:
    options = command_line.parse(__doc__)
    with errors_in_one_line(ValueError, OSError):
        settings = command_line.settings_of(options)
        chosen = device.choose(options.device)
    with device.joined(chosen, settings.deterministic) as here:
        try:
            train(settings, options, here)
        except KeyboardInterrupt:
            raise SystemExit("train.py: interrupted; --resume continues from the last checkpoint") from None


def train(settings: Settings, options: argparse.Namespace, here: device.Place) -> None:
    """Train from the start or the last checkpoint to the end, and write logs and checkpoints."""
    path = options.out / "checkpoint.pt"
    with errors_in_one_line(ValueError, OSError):
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
        save()  # last: after a kill, the logs are written again

    with errors_in_one_line(OSError):
        run.train(after_step, after_epoch)
        if logs:
            logs.close()


@contextmanager
def errors_in_one_line(*kinds: type[Exception]):
    """Report invalid settings or a full disk in one line, without a traceback."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"train.py: {error}") from None


if __name__ == "__main__":
    main()
