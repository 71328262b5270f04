"""Direct feedback alignment: the error of a model's output, broadcast to its layers by random projections.

Autograd knows the error first and the layers' inputs last. So each layer cuts its input off from what made it, and the
model's output takes all those inputs along: its backward hands each of them its projection of the error, all in one
product, and nothing flows from layer to layer. A plain ``loss.backward()`` does.

What a pass has seen belongs to the thread it runs in, since threads may share a model.
"""

import threading
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor, nn

from pyfeedback.init import Init, fresh


class DirectFeedback:
    """What the layers of one model share: the inputs they have seen in this pass, and the projections.

    A layer's projection [its input's size, the output's size] is drawn when the model first runs, by ``init``, as
    torch.nn draws a linear weight of that shape unless it says otherwise. The model's buffer ``direct_feedback_seed``
    draws the same again from a checkpoint. A ``density`` below 1 makes it sparse. Where ``shared``, each layer takes
    the first rows of one.

    Source: Nokland, NeurIPS 2016 (arXiv 1609.01596); shared: Launay, Poli and Krzakala, 2019 (arXiv 1906.04554).
    """

    def __init__(self, init: Init, shared: bool):
        self.init, self.shared = init, shared
        self._passes = _Passes()
        self._untapped: set[str] = set()  # layers of a pass that learns, which ran without gradients
        self._drawn: dict[tuple, Tensor] = {}
        self._number, self._seed_seen = -1, (0, -1)
        _exclude_from_compilation()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _exclude_from_compilation()

    def attach(self, model: nn.Module) -> None:
        """Stand at the two ends of the model's forward."""
        seed = int(torch.randint(2**31, ())) if self.init.seed is None else self.init.seed
        model.register_buffer("direct_feedback_seed", torch.tensor(seed))
        model.direct_feedback = self  # type: ignore[assignment]
        self._hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._broadcast),
            model.register_load_state_dict_pre_hook(_keep_seed),
        )

    def detach(self, model: nn.Module) -> None:
        """Leave nothing of :meth:`attach`."""
        for hook in self._hooks:
            hook.remove()
        del model.direct_feedback, model.direct_feedback_seed

    def detach_input(self, layer: str, input: Tensor) -> Tensor:
        """The input without its history, which the output takes along instead.

        Raises:
            RuntimeError: reentrant checkpointing computes the layer again, in a backward pass. The first time was
                without gradients, so the output did not take the input along.
        """
        taps = self._passes.taps
        if not torch.is_grad_enabled():
            if taps is not None and self._passes.learns and all(name != layer for name, _ in taps):
                self._untapped.add(layer)
            return input
        if not input.requires_grad:
            return input
        if taps is not None:
            taps.append((layer, input))
            self._untapped.discard(layer)
        elif layer in self._untapped and not torch.compiler.is_compiling() and _in_backward():
            raise RuntimeError(
                f"{layer} is computed again by reentrant checkpointing, where dfa has no error for it: expected "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        return input.detach()

    def projection(self, inputs: list[tuple[str, int]], outputs: int, seed: Tensor, like: Tensor) -> Tensor:
        """The projections of these layers, by name and size, one below the other: [sum of the sizes, outputs]."""
        key = (tuple(inputs), outputs, like.dtype, like.device)
        with _drawing:
            if self._seed_seen != (id(seed), seed._version):  # reading it makes a device wait
                number = int(seed)
                if number != self._number:
                    self._number, self._drawn = number, {}
                self._seed_seen = (id(seed), seed._version)
            if key not in self._drawn:
                self._drawn = {key: torch.cat(self._parts(inputs, outputs)).to(like)}
            return self._drawn[key]

    def _parts(self, inputs: list[tuple[str, int]], outputs: int) -> list[Tensor]:
        if self.shared:
            whole = self._draw(self._number, max(size for _, size in inputs), outputs)
            return [whole[:size] for _, size in inputs]
        return [self._draw(self._number + crc32(layer.encode()), size, outputs) for layer, size in inputs]

    def _draw(self, seed: int, size: int, outputs: int) -> Tensor:
        projection = torch.empty(size, outputs)
        replace(self.init, seed=seed).draw(projection, projection, fresh)
        return projection

    def _begin(self, model: nn.Module, inputs: tuple) -> None:
        self._passes.taps, self._passes.learns = [], torch.is_grad_enabled()

    def _broadcast(self, model: nn.Module, inputs: tuple, output: object) -> Tensor | None:
        taps, self._passes.taps = self._passes.taps, None
        if not taps:
            return None
        if not isinstance(output, Tensor) or output.dim() < 2:
            what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"output is {what}, expected one tensor [N, ...]: dfa broadcasts its gradient")
        for layer, input in taps:
            if len(input) != len(output):
                shapes = f"input of {layer} has shape {tuple(input.shape)} and output {tuple(output.shape)}"
                raise ValueError(f"{shapes}, expected the batch in dimension 0 of both")
        sizes = [(layer, input[0].numel()) for layer, input in taps]
        seed: Tensor = model.direct_feedback_seed  # type: ignore[assignment]
        projection = self.projection(sizes, output[0].numel(), seed, output.detach())
        return _Broadcast.apply(output, projection, *(input for _, input in taps))


class _Passes(threading.local):
    """The pass of this thread that is under way: what it has seen, and whether it began with gradients.

    A copy has none under way.
    """

    taps: list[tuple[str, Tensor]] | None = None
    learns = False

    def __reduce__(self):
        return _Passes, ()


_drawing = threading.Lock()


def _exclude_from_compilation() -> None:
    """Have the compiler call ``projection``, which draws at the first pass alone, instead of tracing it.

    This imports torch._dynamo, which takes longer than torch itself: it is done for models that use dfa, not at import.
    """
    if not hasattr(DirectFeedback.projection, "_torchdynamo_disable"):
        reason = "draws what depends on no input, at the first pass alone"
        DirectFeedback.projection = torch.compiler.disable(DirectFeedback.projection, reason=reason)  # type: ignore[method-assign]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass
class DirectInput:
    """The input of one layer of a :class:`DirectFeedback`."""

    layer: str
    shared: DirectFeedback

    def detach(self, input: Tensor) -> Tensor:
        """:meth:`DirectFeedback.detach_input` under the layer's name."""
        return self.shared.detach_input(self.layer, input)


class _Broadcast(torch.autograd.Function):
    """The output as it is; backward, its gradient, and its projection to each of the inputs."""

    @staticmethod
    def forward(ctx, output, projection, *inputs):
        ctx.save_for_backward(projection)
        ctx.shapes, ctx.dtypes = [t.shape for t in inputs], [t.dtype for t in inputs]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        (projection,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError("pyfeedback: double backward is not defined: a feedback path is no derivative")
        errors = grad_output.flatten(1) @ projection.t()
        parts = errors.split([shape[1:].numel() for shape in ctx.shapes], 1)
        grads = (part.reshape(s).to(d) for part, s, d in zip(parts, ctx.shapes, ctx.dtypes, strict=True))
        return grad_output, None, *grads


def _keep_seed(model: nn.Module, state_dict: dict, prefix: str, *others) -> None:
    """A checkpoint of the plain model loads, and leaves the projections as they are."""
    state_dict.setdefault(f"{prefix}direct_feedback_seed", model.direct_feedback_seed)
