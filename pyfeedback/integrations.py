"""Callbacks for the trainers of Lightning and transformers, which are imported only when a callback is made.

The model is converted before training. The callback makes the trainer's own optimizer step the feedback weights
(:func:`pyfeedback.optim.follow`), and logs the angle between W and B of each layer.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfeedback.core.values import check_int
from pyfeedback.metrics import alignment
from pyfeedback.optim import Follower, follow

_log = logging.getLogger("pyfeedback")


def lightning_callback(*, every: int = 100, **options) -> Any:
    """Return a callback of Lightning: ``Trainer(callbacks=[pyfeedback.integrations.lightning_callback()])``.

    Args:
        every: the number of steps between readings of the angles, logged as ``angle/<layer>`` in degrees; 0 for none.
        options: of :func:`pyfeedback.optim.follow`.

    The state of the feedback weights is part of the trainer's checkpoints.

    Raises:
        ImportError: Lightning is not installed.
        ValueError, TypeError: ``every`` is invalid.
    """
    check_int("every", every)
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback  # the same package under its older name

    class FollowOptimizer(Callback):
        def __init__(self) -> None:
            self.followers: list[Follower] = []
            self._read = 0

        def on_fit_start(self, trainer, pl_module) -> None:
            for follower in self.followers:  # of an earlier fit: checkpoints may have been saved after it
                follower.release()
            self.followers = [follow(optimizer, pl_module, **options) for optimizer in trainer.optimizers]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if every and trainer.global_step >= self._read + every:
                self._read = trainer.global_step
                pl_module.log_dict(_angles(pl_module))

    return FollowOptimizer()


def transformers_callback(*, every: int = 100, **options) -> Any:
    """Return a callback of the transformers Trainer, ``Trainer(callbacks=[transformers_callback()])``.

    Args:
        every: the number of steps between readings of the angles, which the next entry of ``state.log_history`` has as
            ``angle/<layer>`` in degrees; 0 for none.
        options: of :func:`pyfeedback.optim.follow`.

    The state of the feedback weights is part of ``optimizer.pt`` in a checkpoint, and is read from
    ``output_dir/checkpoint-<step>`` when training resumes.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: ``every`` is invalid.
    """
    check_int("every", every)
    from transformers import TrainerCallback

    class FollowOptimizer(TrainerCallback):
        def __init__(self) -> None:
            self.follower: Follower | None = None
            self._angles: dict[str, float] = {}

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **others) -> None:
            if self.follower is not None:  # of an earlier call of train
                self.follower.release()
            self.follower = follow(optimizer, model, **options)
            if state.global_step:  # the trainer has loaded the state of the optimizer before
                saved = Path(args.output_dir, f"checkpoint-{state.global_step}", "optimizer.pt")
                if saved.is_file():
                    self.follower.restore(torch.load(saved, map_location="cpu", weights_only=True))
                else:
                    _log.warning("%s is not a file: the momentum and steps of the feedback weights begin anew", saved)

        def on_step_end(self, args, state, control, model=None, **others) -> None:
            if every and state.global_step % every == 0:
                self._angles = _angles(model)

        def on_log(self, args, state, control, logs=None, **others) -> None:
            for entry in (logs, state.log_history[-1] if state.log_history else None):
                if entry is not None:
                    entry.update(self._angles)
            self._angles = {}

    return FollowOptimizer()


def _angles(model: nn.Module | None) -> dict[str, float]:
    assert model is not None
    return {f"angle/{name}": layer.angle for name, layer in alignment(model).items()}
