"""Callbacks for the trainers of Lightning and transformers, which are imported only when a callback is made.

The callback converts the model if it has a rule, makes the trainer's own optimizer step the feedback weights
(:func:`pyfeedback.optim.follow`), and logs the angle between W and B of each layer.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfeedback.conversion import convert_once, is_converted, rules_by_pattern
from pyfeedback.core.values import check_int, describe
from pyfeedback.init import Init, as_init
from pyfeedback.metrics import alignment
from pyfeedback.optim import Follower, follow
from pyfeedback.rules import Rule

_log = logging.getLogger("pyfeedback")

TOO_LATE = (
    "the model is not converted, but training resumes from a checkpoint or is distributed, expected "
    "Trainer(callbacks=[...]) instead of add_callback, and pyfeedback.convert in model_init"
)
Rules = str | Rule | Mapping[str, str | Rule] | None


def lightning_callback(
    rule: Rules = None,
    *,
    init: Init | Callable[[Tensor], object] | None = None,
    every: int = 100,
    **options,
) -> Any:
    """Return a callback of Lightning: ``Trainer(callbacks=[pyfeedback.integrations.lightning_callback("ia")])``.

    Args:
        rule, init: as in :func:`pyfeedback.convert`. The module is converted in ``setup``, before its optimizers are
            built and a checkpoint is loaded, unless it follows the rule already. Without a rule, convert it yourself. A
            module that makes its layers in its own ``setup`` or in ``configure_model`` has to convert them there.
        every: the number of steps between readings of the angles, logged as ``angle/<layer>`` in degrees; 0 for none.
        options: of :func:`pyfeedback.optim.follow`.

    The state of the feedback weights is part of the trainer's checkpoints.

    Raises:
        ImportError: Lightning is not installed.
        ValueError, TypeError: an argument is invalid. From the trainer: the module has no layer to convert, or follows
            another rule.
    """
    _check(rule, init, every)
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback  # the same package under its older name

    class FollowOptimizer(Callback):
        def __init__(self) -> None:
            self.followers: list[Follower] = []
            self._read = 0

        def setup(self, trainer, pl_module, stage) -> None:
            if rule is not None:
                convert_once(pl_module, rule, init)

        def on_fit_start(self, trainer, pl_module) -> None:
            for follower in self.followers:  # of an earlier fit: checkpoints may have been saved after it
                follower.release()
            self.followers = [follow(optimizer, pl_module, **options) for optimizer in trainer.optimizers]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if every and trainer.global_step >= self._read + every:
                self._read = trainer.global_step
                pl_module.log_dict(_angles(pl_module))

    return FollowOptimizer()


def transformers_callback(
    rule: Rules = None,
    *,
    init: Init | Callable[[Tensor], object] | None = None,
    every: int = 100,
    **options,
) -> Any:
    """Return a callback of the transformers Trainer, ``Trainer(callbacks=[transformers_callback("ia")])``.

    Args:
        rule, init: as in :func:`pyfeedback.convert`. The model is converted at the end of ``Trainer(...)``, unless it
            follows the rule already; a model that ``model_init`` makes again, when training begins. Without a rule,
            convert it yourself.
        every: the number of steps between readings of the angles, which the next entry of ``state.log_history`` has as
            ``angle/<layer>`` in degrees; 0 for none.
        options: of :func:`pyfeedback.optim.follow`.

    The state of the feedback weights is part of ``optimizer.pt`` in a checkpoint, and is read from
    ``output_dir/checkpoint-<step>`` when training resumes.

    Raises:
        ImportError: transformers is not installed.
        ValueError, TypeError: an argument is invalid. From the Trainer: the model has no layer to convert, or follows
            another rule.
        RuntimeError: from the Trainer, training resumes or is parallel, and the model was not converted before.
    """
    _check(rule, init, every)
    from transformers import TrainerCallback

    class FollowOptimizer(TrainerCallback):
        def __init__(self) -> None:
            self.follower: Follower | None = None
            self._angles: dict[str, float] = {}

        def on_init_end(self, args, state, control, model=None, **others) -> None:
            if rule is not None:
                convert_once(model, rule, init)

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **others) -> None:
            if rule is not None:
                if (state.global_step or args.world_size > 1) and not is_converted(model):
                    raise RuntimeError(TOO_LATE)
                convert_once(model, rule, init)
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


def _check(rule: Rules, init: Init | Callable[[Tensor], object] | None, every: int) -> None:
    check_int("every", every)
    if rule is not None:
        rules_by_pattern(rule)
        as_init(init)
    elif init is not None:
        raise ValueError(f"init is {describe(init)} without a rule, expected None")


def _angles(model: nn.Module | None) -> dict[str, float]:
    assert model is not None
    return {f"angle/{name}": layer.angle for name, layer in alignment(model).items()}
