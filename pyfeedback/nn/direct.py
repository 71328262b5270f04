"""Direct feedback alignment: random projections broadcast the error of a model's output to its layers.

Each layer detaches its input from the graph, so no gradient flows from layer to layer. The original inputs become
arguments of a function that returns the model's output. Its backward pass projects the error to all of them in a single
product. A plain ``loss.backward()`` therefore suffices.

The inputs of a pass are stored per thread, because several threads may run the same model.
"""

import threading
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor, nn

from pyfeedback.core.call import DIFFERENTIATED_ONCE
from pyfeedback.init import Init, default_init_


class DirectFeedback:
    """The state that the layers of a model share: their inputs in the current pass, and the projections.

    A layer's projection [size of its input, size of the output] is drawn by ``init`` when the model first runs; by
    default, like a linear weight of that shape in torch.nn. The model's buffer ``direct_feedback_seed`` reproduces it
    after loading a checkpoint. A ``density`` below 1 makes it sparse. If ``shared``, all layers use the first rows of
    the same projection.

    Source: Nokland, NeurIPS 2016 (arXiv 1609.01596); shared: Launay, Poli and Krzakala, 2019 (arXiv 1906.04554).
    """

    def __init__(self, init: Init, shared: bool):
        self.init, self.shared = init, shared
        self._current = _CurrentPass()
        self._ran_without_grad: set[str] = set()  # layers that ran without gradients, in a pass with gradients
        self._drawn: dict[tuple, Tensor] = {}
        self._number, self._seed_seen = -1, (0, -1)
        _exclude_from_compilation()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        _exclude_from_compilation()

    def attach(self, model: nn.Module) -> None:
        """Register the hooks before and after the model's forward."""
        seed = int(torch.randint(2**31, ())) if self.init.seed is None else self.init.seed
        model.register_buffer("direct_feedback_seed", torch.tensor(seed))
        model.direct_feedback = self  # type: ignore[assignment]
        self._hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._broadcast),
            model.register_load_state_dict_pre_hook(_keep_seed),
        )

    def detach(self, model: nn.Module) -> None:
        """Undo :meth:`attach`."""
        for hook in self._hooks:
            hook.remove()
        del model.direct_feedback, model.direct_feedback_seed

    def detach_input(self, layer: str, input: Tensor) -> Tensor:
        """Detach the input, and record it for the broadcast of the error.

        Raises:
            RuntimeError: reentrant checkpointing runs the layer again, in a backward pass. Its first run was without
                gradients, so the input was not recorded.
        """
        inputs = self._current.inputs
        if not torch.is_grad_enabled():
            if inputs is not None and self._current.learns and all(name != layer for name, _ in inputs):
                self._ran_without_grad.add(layer)
            return input
        if not input.requires_grad:
            return input
        if inputs is not None:
            inputs.append((layer, input))
            self._ran_without_grad.discard(layer)
        elif layer in self._ran_without_grad and not torch.compiler.is_compiling() and _in_backward():
            raise RuntimeError(
                f"{layer} is recomputed by reentrant checkpointing, in which dfa has no error signal for it: expected "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        return input.detach()

    def projection(self, inputs: list[tuple[str, int]], outputs: int, seed: Tensor, like: Tensor) -> Tensor:
        """Return the projections of layers, given by name and size, stacked to [sum of the sizes, outputs]."""
        key = (tuple(inputs), outputs, like.dtype, like.device)
        with _drawing:
            if self._seed_seen != (id(seed), seed._version):  # reading the seed synchronizes a GPU
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
        replace(self.init, seed=seed).draw(projection, projection, default_init_)
        return projection

    def _begin(self, model: nn.Module, inputs: tuple) -> None:
        self._current.inputs, self._current.learns = [], torch.is_grad_enabled()

    def _broadcast(self, model: nn.Module, arguments: tuple, output: object) -> Tensor | None:
        inputs, self._current.inputs = self._current.inputs, None
        if not inputs:
            return None
        for what, is_active in (
            ("torch.func", torch._C._are_functorch_transforms_active()),
            ("torch.export", torch.compiler.is_exporting()),
        ):
            if is_active:
                raise RuntimeError(
                    f"the model follows dfa, expected another rule under {what}, or pyfeedback.unconvert"
                )
        if not isinstance(output, Tensor) or output.dim() < 2:
            what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"output is {what}, expected one tensor [N, ...]: dfa broadcasts its gradient")
        for layer, input in inputs:
            if len(input) != len(output):
                shapes = f"input of {layer} has shape {tuple(input.shape)} and output {tuple(output.shape)}"
                raise ValueError(f"{shapes}, expected the batch in dimension 0 of both")
        sizes = [(layer, input.shape[1:].numel()) for layer, input in inputs]
        seed: Tensor = model.direct_feedback_seed  # type: ignore[assignment]
        projection = self.projection(sizes, output.shape[1:].numel(), seed, output.detach())
        return _Broadcast.apply(output, projection, *(input for _, input in inputs))


class _CurrentPass(threading.local):
    """The forward pass that this thread is running: the inputs of layers so far, and whether it began with gradients.

    A copy or a pickle starts without a pass.
    """

    inputs: list[tuple[str, Tensor]] | None = None
    learns = False

    def __reduce__(self):
        return _CurrentPass, ()


_drawing = threading.Lock()


def _exclude_from_compilation() -> None:
    """Make the compiler call ``projection`` instead of tracing it, because it draws only in the first pass.

    This imports torch._dynamo, which takes longer than torch itself, so it is done for models that use dfa and not when
    the package is imported.
    """
    if not hasattr(DirectFeedback.projection, "_torchdynamo_disable"):
        reason = "draws in the first pass only, independently of the inputs"
        DirectFeedback.projection = torch.compiler.disable(DirectFeedback.projection, reason=reason)  # type: ignore[method-assign]


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@dataclass
class DirectInput:
    """The input of one layer of a :class:`DirectFeedback`."""

    layer: str
    shared: DirectFeedback

    def detach(self, input: Tensor) -> Tensor:
        """Call :meth:`DirectFeedback.detach_input` with the layer's name."""
        return self.shared.detach_input(self.layer, input)


class _Broadcast(torch.autograd.Function):
    """Returns the output unchanged; backward also returns the projection of its gradient for each of the inputs."""

    @staticmethod
    def forward(ctx, output, projection, *inputs):
        ctx.save_for_backward(projection)
        ctx.shapes, ctx.dtypes = [t.shape for t in inputs], [t.dtype for t in inputs]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output):
        (projection,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(DIFFERENTIATED_ONCE)
        errors = grad_output.flatten(1) @ projection.t()
        parts = errors.split([shape[1:].numel() for shape in ctx.shapes], 1)
        grads = (part.reshape(s).to(d) for part, s, d in zip(parts, ctx.shapes, ctx.dtypes, strict=True))
        return grad_output, None, *grads


def _keep_seed(model: nn.Module, state_dict: dict, prefix: str, *others) -> None:
    """Let a checkpoint of the plain model load; the projections do not change."""
    state_dict.setdefault(f"{prefix}direct_feedback_seed", model.direct_feedback_seed)
