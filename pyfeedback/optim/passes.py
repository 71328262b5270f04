"""The gradients of feedback weights from autograd, taken out of ``.grad`` as soon as a backward pass has made them.

What works on ``.grad`` between the backward pass and the step, such as GradScaler, gradient clipping and the optimizer
of W, then never sees them. They are summed over the passes of a step, and the number of passes is counted.
"""

import gc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfeedback.nn import FeedbackLayer
from pyfeedback.optim.rows import weight_parameters

_queue_callback = torch.autograd.Variable._execution_engine.queue_callback  # runs when the backward pass has ended


class _Passes:
    """The passes since the last step. The latest is kept apart: it may turn out to be the first of a new step."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.latest: Tensor | None = None
        self.task, self.count, self.latest_count = -1, 0, 0

    def add(self, grad: Tensor, task: int, count: int = 1) -> None:
        if self.latest is not None:
            self.total = self.latest if self.total is None else self.total.add_(self.latest)
        self.latest, self.task, self.latest_count = grad, task, count
        self.count += count

    def restart(self, task: int) -> None:
        """Drop all passes except the one of the backward pass ``task``."""
        if self.task != task:
            self.latest, self.latest_count = None, 0
        self.total, self.count = None, self.latest_count

    def take(self) -> tuple[Tensor, int] | None:
        """Return the sum and the number of passes, and forget them."""
        total, latest, count = self.total, self.latest, self.count
        self.__init__()  # type: ignore[misc]
        if latest is None:
            return None
        return latest if total is None else total.add_(latest), count


class PassGradients:
    """Takes the gradients of feedback weights that autograd computes.

    Passes are dropped if the gradient of W was cleared without a step, as after a step that GradScaler skipped.

    Under DistributedDataParallel, ``.grad`` is taken at the end of a pass, when it is averaged over the ranks. Passes
    under ``no_sync`` leave it where it is, since the next synchronized pass averages the sum.

    Args:
        layers: by feedback weight.
        optimizer: returns the optimizer, or None if it no longer exists: gradients are then left in ``.grad``.
    """

    def __init__(self, layers: Mapping[nn.Parameter, FeedbackLayer], optimizer: Callable[[], object]):
        self._layers = dict(layers)
        self._optimizer = optimizer
        self._passes = {b: _Passes() for b in layers}
        self._local = dict.fromkeys(layers, 0)  # passes in .grad that are not yet averaged over the ranks
        self._replicas: list[DistributedDataParallel] | None = None  # searched for in the first pass
        self._task = -1  # the pass at whose end the gradients will be taken
        self._handles: dict[nn.Parameter, list] = {}
        for b, layer in layers.items():
            self._handles[b] = [b.register_post_accumulate_grad_hook(self._accumulated)] if b.requires_grad else []
            source = next((p for p in weight_parameters(layer) if p.requires_grad), None)
            if b.requires_grad and source is not None:
                self._handles[b].append(source.register_hook(self._on_weight(b, source)))

    def take(self) -> dict[nn.Parameter, tuple[Tensor, int]]:
        """Return the sum over the passes since the last step, and their number, by feedback weight; forget them."""
        taken = {b: passes.take() for b, passes in self._passes.items()}
        return {b: found for b, found in taken.items() if found is not None}

    def remove(self, *feedback: nn.Parameter) -> None:
        """Leave the gradients of these feedback weights in ``.grad`` from now on."""
        for b in feedback:
            for handle in self._handles.pop(b, ()):
                handle.remove()
            self._passes.pop(b, None)

    def _on_weight(self, b: nn.Parameter, source: nn.Parameter) -> Callable[[Tensor], None]:
        def before_accumulation(grad: Tensor) -> None:
            if source.grad is None and b in self._passes:
                self._passes[b].restart(torch._C._current_graph_task_id())

        return before_accumulation

    def _accumulated(self, b: nn.Parameter) -> None:
        if self._optimizer() is None:
            for layer in self._layers.values():
                layer.has_optimizer = False
            self.remove(*self._layers)
            return
        if self._replicas is None:
            self._replicas = data_parallel(self._layers.values())
        task = torch._C._current_graph_task_id()
        if not self._replicas:
            self._move(b, task)
        elif self._task != task:
            self._task = task
            # DistributedDataParallel queues the end of its reduction later than this, but before this callback runs.
            _queue_callback(lambda: _queue_callback(self._take_reduced))

    def _take_reduced(self) -> None:
        assert self._replicas is not None
        synchronized = all(replica.require_backward_grad_sync for replica in self._replicas)
        for b in self._passes:
            if b.grad is not None and b.requires_grad:
                self._local[b] += 1
                if synchronized:
                    self._move(b, self._task, self._local[b])
                    self._local[b] = 0

    def _move(self, b: nn.Parameter, task: int, count: int = 1) -> None:
        grad, b.grad = b.grad, None
        if self._layers[b].rule.learns and grad is not None:
            shares = any(replica.gradient_as_bucket_view for replica in self._replicas or ())
            self._passes[b].add(grad.clone() if shares else grad, task, count)


def data_parallel(layers) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules that have any of these layers.

    A module has no reference to its wrapper, so the wrapper is searched for among all objects of the process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    own = set(layers)
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    return [wrapper for wrapper in wrappers if not own.isdisjoint(wrapper.modules())]
