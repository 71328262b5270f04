"""One layer's backward as launches: which products share one, and the rule's gradient from them.

Notation as in the contract of the ops: x the input, y = conv(x, W) the response without bias, B the feedback weight,
n the samples, z = convT(y, B).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dgrad import launch_dgrad
from .geometry import Geometry
from .joint import launch_joint
from .launch import architecture
from .single import launch_single
from .tiles import DgradTile, SingleTile, WgradTile, choose_joint, choose_single
from .wgrad import centered_operands, launch_wgrad

Center = Callable[[Tensor, int], Tensor]

# One block of x'x, computed beside dW, spares a second reading of x; of more blocks, half are spared apart from dW.
MOMENT_JOINS = 128


class Layer(NamedTuple):
    """A layer and its layouts. A block is what the kernels read: [n, H, W, C] or [n, P, Q, K] without gaps, of a
    pointwise layer [n * positions, 1, 1, channels]."""

    geometry: Geometry
    rows: int  # of a block, for each sample
    weight: Tensor
    respond: Callable[[Tensor, Tensor], Tensor]  # conv(x, kernel), in the caller's layouts
    block_input: Callable[[Tensor], Tensor]
    block_output: Callable[[Tensor], Tensor]
    tf32: bool
    joined: bool  # a single pass, or a joint launch, where there is one


class Backward:
    """The launches of one backward pass. dW and dx wait for a launch that reads what they read, and join it."""

    def __init__(self, layer: Layer, x: Tensor, dy: Tensor, feedback: Tensor, dw: Tensor | None, dx: Tensor | None):
        """Blocks x, dy and dx; feedback and dw in the layout of the weight; dw or dx is None where it is not wanted."""
        self.layer, self.x, self.dy, self.feedback, self.dw = layer, x, dy, feedback, dw
        self.weight_waits = {} if dw is None else {"a": dy, "dw": channels_last(dw)}
        self.input_waits = {} if dx is None else {"dy": dy, "dx": dx}

    def finish_weight(self) -> None:
        """Launch dW if it still waits, and dx with it where one pass can."""
        if self.weight_waits and not self.single("none", self.x):
            waits, self.weight_waits = self.weight_waits, {}
            self.launch_wgrad(self.x, **waits)

    def finish_input(self) -> None:
        """Launch dx if it still waits."""
        if self.input_waits:
            waits, self.input_waits = self.input_waits, {}
            self.launch_dgrad(self.layer.geometry.N, **waits)

    def launch_wgrad(self, x: Tensor, **terms) -> None:
        """A weight gradient; of a small layer dx goes with it if it still waits."""
        wgrad = {"x": x, "geometry": self.layer.geometry._replace(N=x.shape[0]), **terms}
        rows = tuple(t.shape[-1] if t is not None else 0 for t in (terms.get("a"), terms.get("u")))
        means = centered_operands(x, terms.get("u"), terms.get("mean"))
        tiles = self.joint_tiles(rows, False, means) if self.input_waits else None
        if tiles is None:
            launch_wgrad(**wgrad, tf32=self.layer.tf32)
        else:
            self.launch_joint(wgrad, {"geometry": self.layer.geometry, **self.input_waits}, tiles)
            self.input_waits = {}

    def launch_dgrad(self, n: int, **terms) -> None:
        """An input gradient of n; of a small layer dW goes with it if it still waits."""
        dgrad = {"geometry": self.layer.geometry._replace(N=n), **terms}
        tiles = self.joint_tiles((self.dy.shape[-1], 0), len(terms) > 2) if self.weight_waits else None
        if tiles is None:
            launch_dgrad(channels_last(self.feedback).contiguous(), **dgrad, tf32=self.layer.tf32)
        else:
            self.launch_joint({"x": self.x, "geometry": self.layer.geometry, **self.weight_waits}, dgrad, tiles)
            self.weight_waits = {}

    def joint_tiles(self, rows: tuple[int, int], dual: bool, means: int = 0) -> tuple[WgradTile, DgradTile] | None:
        """The tiles of a joint launch, if the layer is small; None where dx and dW wait for a single pass."""
        if not self.layer.joined or self.single_tile("none") is not None:
            return None
        device = architecture(self.x.device)
        return choose_joint(self.layer.geometry, rows, dual, self.x.element_size(), *device, means)

    def launch_joint(self, wgrad: dict, dgrad: dict, tiles: tuple[WgradTile, DgradTile]) -> None:
        """Both in one launch, arguments as in launch_wgrad and launch_dgrad."""
        tf32 = {"tf32": self.layer.tf32}
        kernel = channels_last(self.feedback).contiguous()
        launch_joint(wgrad | tf32, {"feedback": kernel} | dgrad | tf32, tiles, self.x.device)

    def single_tile(self, term: str, centered: bool = False) -> SingleTile | None:
        """The tile of a single pass, if one can compute all that waits: dx, dW and the term."""
        if not (self.layer.joined and self.weight_waits and self.input_waits):
            return None
        if not channels_last(self.layer.weight).is_contiguous():
            return None
        device = architecture(self.x.device)
        return choose_single(self.layer.geometry, term, self.x.element_size(), *device, centered)

    def single(self, term: str, x: Tensor, **terms) -> bool:
        """dx, dW and the term of x in one pass, ``terms`` as in launch_single, if there is one."""
        ours = x.data_ptr() == self.x.data_ptr() and terms.pop("feedback", self.feedback) is self.feedback
        tile = self.single_tile(term, terms.get("mean") is not None) if ours else None
        if tile is not None:
            launch_single(
                self.x, self.layer.geometry, term, dy=self.dy, dx=self.input_waits["dx"], dw=self.dw,
                feedback=channels_last(self.feedback).contiguous(), **terms, tf32=self.layer.tf32, tile=tile,
            )  # fmt: skip
            self.weight_waits, self.input_waits = {}, {}
        return tile is not None

    def correlate(self, x: Tensor, out: Tensor, u: Tensor | None, tie: float = 0.0, **terms) -> Tensor:
        """out = scale * unit * wgrad(x - mean, u) + tie * dW + the other terms of launch_wgrad's epilogue.

        dW joins if x is its x.
        """
        if u is not x and self.single("none" if u is None else "response", x, y=u, f=out, tie=tie, **terms):
            return out
        along = {}
        if x is self.x and self.weight_waits:
            along, self.weight_waits = self.weight_waits, {}
        elif tie and self.dw is not None:
            self.finish_weight()
            along = {"dw": channels_last(self.dw)}
        for name in ("weight", "feedback"):
            if name in terms:
                terms[name] = channels_last(strided_like(terms[name], out))
        self.launch_wgrad(x, u=u, f=channels_last(out), tie=tie, **terms, **along)
        return out

    def moment(self, t: Tensor, mean: Tensor | None = None) -> Tensor:
        """t't [c, c] in float32, of a pointwise layer's block t minus its mean.

        dW joins if t is its x and has few channels.
        """
        c = t.shape[-1]
        out = torch.empty(c, c, dtype=torch.float32, device=t.device)
        if t is self.x and self.single("moment", t, f=out, mean=mean):
            return out
        if t is self.x and c <= MOMENT_JOINS:
            return self.correlate(t, out, t, mean=mean)
        launch_wgrad(t, Geometry(t.shape[0], c, c), u=t, f=channels_last(out), mean=mean, tf32=self.layer.tf32)
        return out

    def project_and_correlate(
        self, x: Tensor, y: Tensor, out: Tensor, z_scale: float, x_scale: float, mean: Tensor | None, **epilogue
    ) -> Tensor:
        """out = scale * wgrad(z_scale * convT(y, B) - x_scale * (x - mean), y) + the terms of launch_wgrad's epilogue.

        In float16 the first factor is stored in units that keep it in range.
        """
        unit = unit_of(self.feedback, dim=1) if x.dtype is torch.float16 else None
        z = {"z_scale": z_scale, "x_scale": x_scale, "mean": mean, "unit": unit}
        if self.single("projection", x, y=y, f=out, **z, **epilogue):
            return out
        return self.correlate(self.project(y, x, **z), out, y, unit=unit, **epilogue)

    def project(self, y: Tensor, x: Tensor, **terms) -> Tensor:
        """z of launch_dgrad, a block of the input; dx joins if y is of the whole batch."""
        z, along = torch.empty_like(x), {}
        if y.shape[0] == self.dy.shape[0]:
            along, self.input_waits = self.input_waits, {}
        self.launch_dgrad(y.shape[0], y=y, x=x, z=z, **terms, **along)
        return z


def feedback_gradient(
    launches: Backward, input: Tensor, response: Tensor | None, rule, form: str, center: Center
) -> Tensor:
    """dR/dB + tie * dW; input and response in the caller's layouts, ``form`` as in ``ops.conv2d_backward``."""
    layer, n = launches.layer, rule.samples or input.shape[0]
    if form == "none":
        return _without_data(launches, rule)
    x = launches.x if n == input.shape[0] else launches.x[: n * layer.rows]
    # Both factors of every product are centred, and centred themselves: a product of which one factor alone is, or from
    # which that of the means is subtracted, cancels where the mean is large beside the spread.
    mean = x.view(n, -1, x.shape[-1]).mean(0, dtype=torch.float32) if rule.center else None
    if form == "input_moment":
        moment = launches.moment(x, mean)
        return _elementwise(launches, _input_moment(moment, layer.weight, launches.feedback, rule), rule, n)
    y = None
    if form == "response_moment" or rule.null or not rule.sparse:
        y = layer.respond(input[:n], layer.weight) if response is None else response[:n]
        y = layer.block_output(center(y, n) if rule.center else y)
    if form == "response_moment" and launches.single_tile("projection", rule.center) is None:
        return _elementwise(launches, _response_moment(launches, x, y, rule, mean), rule, n)
    rest = {"weight": layer.weight, "feedback": launches.feedback}
    rest |= {"decay": rule.decay, "self_": rule.self_, "tie": rule.tie}
    if not rule.sparse:
        return _response_terms(launches, x, y, rule, n, rest, mean)
    scale = max(abs(rule.sparse), abs(rule.amp))
    # The combined kernel stays exact where B nears W and the difference of two convolutions would cancel.
    kernel, unit = blend(launches.feedback, layer.weight, rule.sparse / scale, rule.amp / scale), None
    if input.dtype is torch.float16:
        unit = unit_of(kernel, dim=0)
        kernel /= unit
    # The response is linear: that of a centred input is centred, and is not rounded at the size of its mean.
    u = layer.block_output(layer.respond(center(input, n) if rule.center else input[:n], kernel.to(input.dtype)))
    out = torch.empty_like(layer.weight, dtype=torch.float32 if rule.null else None)
    out = launches.correlate(x, out, u, scale=scale / n, unit=unit, mean=mean, **rest)
    if not rule.null:
        return out
    return _response_terms(launches, x, y, rule._replace(amp=0.0), n, {"feedback": out, "decay": 1.0}, mean)


def _without_data(launches: Backward, rule) -> Tensor:
    weight, feedback = launches.layer.weight, launches.feedback
    if not launches.weight_waits:
        return strided_like(blend(feedback, weight, rule.decay, rule.self_).to(weight.dtype), torch.empty_like(weight))
    rest = {"decay": rule.decay, "self_": rule.self_, "tie": rule.tie}
    out = torch.empty_like(weight)
    return launches.correlate(launches.x, out, None, weight=weight, feedback=feedback, **rest)


def _response_terms(launches: Backward, x: Tensor, y: Tensor, rule, n: int, rest: dict, mean: Tensor | None) -> Tensor:
    """wgrad(null z - amp x, y) / n and the rest, the larger coefficient taken out of z; y is centred, x by its mean."""
    out = torch.empty_like(launches.layer.weight)
    if not rule.null:
        return launches.correlate(x, out, y, scale=-rule.amp / n, mean=mean, **rest)
    if abs(rule.amp) <= abs(rule.null):
        scales = {"z_scale": 1.0, "x_scale": rule.amp / rule.null, "scale": rule.null / n}
    else:
        scales = {"z_scale": -rule.null / rule.amp, "x_scale": -1.0, "scale": -rule.amp / n}
    return launches.project_and_correlate(x, y, out, mean=mean, **scales, **rest)


def _input_moment(moment: Tensor, weight: Tensor, feedback: Tensor, rule) -> Tensor:
    """(sparse B - amp W) G + null W G W' B [K, C], with the second moment G = x'x."""
    w, b = (t.reshape(t.shape[0], -1).float() for t in (weight, feedback))
    total = blend(b, w, rule.sparse, rule.amp) @ moment
    if rule.null:
        mixed = w @ moment
        spread = (mixed @ w.t()) @ b if w.shape[0] < w.shape[1] else mixed @ (w.t() @ b)
        total = total.add_(spread, alpha=rule.null)
    return total


def _response_moment(launches: Backward, x: Tensor, y: Tensor, rule, mean: Tensor | None) -> Tensor:
    """null Y B - amp y'x [K, C], with the second moment Y = y'y; y is centred, x by its mean."""
    feedback = launches.feedback.reshape(launches.feedback.shape[0], -1).float()
    total = rule.null * (launches.moment(y) @ feedback)
    if rule.amp:
        total = total.sub_(launches.correlate(x, torch.empty_like(total), y, mean=mean), alpha=rule.amp)
    return total


def _elementwise(launches: Backward, data: Tensor, rule, n: int) -> Tensor:
    """data [K, C] / n and the terms that read no data, in the weight's layout."""
    weight = launches.layer.weight
    total = data.reshape(weight.shape) / n
    if rule.decay or rule.self_:
        total = total + blend(launches.feedback, weight, rule.decay, rule.self_)
    if rule.tie:
        launches.finish_weight()
        total = total.add_(launches.dw, alpha=rule.tie)
    return torch.empty_like(weight).copy_(total)


def unit_of(kernel: Tensor, dim: int) -> Tensor:
    """[1] in float32: a power of two, in whose units float16 holds what ``kernel`` makes of activations that it holds.

    No sum over the kernel along all dimensions but ``dim`` exceeds its largest absolute sum. An input gradient
    (``dim`` 1, the input's channels) has an activation of up to twice float16's range added besides.
    """
    sums = kernel.abs().sum([d for d in range(kernel.dim()) if d != dim], dtype=torch.float32)
    largest = sums.amax().add(2.0) if dim == 1 else sums.amax().clamp_min(torch.finfo(torch.float32).tiny)
    return largest.log2().ceil().exp2().view(1)


def blend(feedback: Tensor, weight: Tensor, b: float, w: float) -> Tensor:
    """b * B - w * W in float32, exact where b == w and B nears W; what has no coefficient is not read."""
    if not w:
        return b * feedback.float()
    if not b:
        return -w * weight.float()
    difference = b * (feedback.float() - weight.float())
    return difference if b == w else difference.add_(weight, alpha=b - w)


def channels_last(kernel: Tensor) -> Tensor:
    """The view [K, R, S, C] of a kernel [K, C, R, S] or [K, C]."""
    return kernel.permute(0, 2, 3, 1) if kernel.dim() == 4 else kernel[:, None, None]


def strided_like(t: Tensor, like: Tensor) -> Tensor:
    """t with the strides of ``like``: itself where it has them already."""
    return t if t.stride() == like.stride() else torch.empty_like(like, dtype=t.dtype).copy_(t)
