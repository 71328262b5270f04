"""The launches of one layer's backward: a pure function of sizes and options, without tensors.

Notation: x is the input, y = conv(x, W) the response without bias, B the feedback weight, z = convT(y, B), and f the
gradient of B. The launches of each algorithm for the rule's data terms are:

    none            dW, and f in its epilogue
    direct          amp or sparse: dW and f = wgrad(x, u) in one launch, with u = y or conv(x, sparse B - amp W);
                    null: dx and z in one launch, then f = wgrad(z, y)
    input_gram      dW and the Gram matrix x'x, in one launch if there are few channels; then products of K x C matrices
    response_gram   y'y; dW and y'x, in one launch; then products of K x C matrices

dW shares the launch of the first weight gradient that reads the whole x, and dx that of z if z is of the whole batch;
otherwise each has a launch of its own. If ``fused``, there are two further ways to save launches. For a pointwise layer
whose sums fit a processor, a one-pass launch computes dx, dW and one of y'x, y'z or x'x. For a small layer, a joint
launch runs the launch of dW and that of dx together.

The names of the tensors are: x, dy, y, u and z; x_used, the samples of x that the rule reads; B in the layout that the
kernels read; weight and feedback with the strides of f, for its epilogue; dx, dW and f; gram (x'x or y'y) and cross
(y'x); f_sparse, to which the null term is added; x_mean and y_mean, in float32, and x_shift and y_shift, which are near
them; z_unit and u_unit, for float16.
"""

from functools import lru_cache
from typing import Any, NamedTuple

from .dgrad import dgrad_launch
from .geometry import Geometry
from .joint import joint_launch
from .launch import Launch
from .pointwise import pointwise_launch
from .tiles import DgradTile, PointwiseTile, Target, WgradTile, choose_joint, choose_pointwise
from .wgrad import wgrad_launch

EPILOGUE = ("decay", "self_", "tie")  # the coefficients of the terms without data
OPTIONS = ("center", "samples")
DATA_TERMS = {  # the other coefficients that an algorithm implements
    "none": (),
    "direct": ("amp", "null", "sparse"),
    "input_gram": ("amp", "null", "sparse"),
    "response_gram": ("amp", "null"),
}

# With one block of x'x, dW and x'x share a read of x. With more blocks, a separate launch computes only half of them.
SHARED_GRAM_CHANNELS = 128
TASK = frozenset({"dx", "dW"})
ONE_PASS = {"x": "x", "dy": "dy", "dx": "dx", "dw": "dW", "feedback": "B"}


class Problem(NamedTuple):
    """Everything that the launches depend on."""

    geometry: Geometry  # of the whole batch
    rows_per_sample: int  # entries of its dimension N that belong to one sample
    samples: int  # the number of samples that the rule reads
    algorithm: str
    fields: tuple[str, ...]  # names of the rule's fields that are not 0
    wanted: tuple[bool, bool, bool]  # dx, dW, f
    strides: tuple[int, ...]  # (k, r, s, c) of dW and f
    target: Target
    fused: bool = True
    strided: Geometry | None = None  # of a pointwise layer with a stride: with the positions that it does not read

    @property
    def rows_read(self) -> int:
        """The number of entries of dimension N that the rule reads."""
        return self.samples * self.rows_per_sample

    @property
    def batch(self) -> int:
        """The number of samples of the whole batch."""
        return self.geometry.N // self.rows_per_sample

    @property
    def x(self) -> str:
        """The name of the part of the input that the rule reads."""
        return "x" if self.rows_read == self.geometry.N else "x_used"

    @property
    def task(self) -> frozenset[str]:
        """The gradients to compute, of dx and dW; dW is also computed if f is tied to it."""
        dx, dw, f = self.wanted
        return frozenset({"dx"} if dx else ()) | ({"dW"} if dw or (f and "tie" in self.fields) else set())


class Product(NamedTuple):
    """f = wgrad(x, u) plus the terms of the epilogue. If ``z`` is given, x is z, which a dgrad computes first."""

    f: str | None
    x: str
    u: str | None = None
    z: dict[str, Any] | None = None  # arguments of dgrad_launch
    arguments: dict[str, Any] = {}  # other arguments of wgrad_launch  # noqa: RUF012

    @property
    def term(self) -> str:
        """The TERM of this product in a one-pass pointwise backward."""
        return "z" if self.z is not None else "none" if self.u is None else "gram" if self.u == self.x else "cross"


DW_ALONE = Product(None, "x")


class Plan(NamedTuple):
    """The launches in order, and the step that follows them."""

    launches: tuple[Launch, ...]
    finish: str  # how f is composed: "blend" (from the terms without data), "input_gram", "response_gram", or ""
    operands: frozenset[str]  # all names that the launches use
    dx: Geometry  # of which dx is the input: with the positions that the layer does not read, or without


@lru_cache(4096)
def plan_backward(p: Problem) -> Plan:
    """The launches of one backward pass.

    Raises:
        ValueError: the algorithm is unknown, or the rule has a coefficient that the kernels do not implement.
    """
    if p.algorithm not in DATA_TERMS:
        raise ValueError(f"algorithm is {p.algorithm!r}, expected one of {', '.join(DATA_TERMS)}")
    for name in p.fields:
        if name not in (*EPILOGUE, *OPTIONS, *DATA_TERMS[p.algorithm]):
            by = f"the Triton kernels do not implement it by algorithm {p.algorithm!r}"
            raise ValueError(f"rule.{name} is not 0, expected 0: {by}")
    products, finish = data_products(p) if p.wanted[2] else ((), "")
    launches, remaining = [], p.task  # remaining: dx and dW, until a launch computes them
    for product in (*products, DW_ALONE):
        if product is not DW_ALONE or "dW" in remaining:
            more, remaining = _launches(p, remaining, product)
            launches += more
    if "dx" in remaining:
        launches.append(_dgrad(p, remaining)[0])
    names, dx = set(), p.geometry
    for launch in launches:
        for value in launch.arguments.values():
            names |= {v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str)}
        if p.strided and launch.constants["GEO"] == p.strided.constants():
            dx = p.strided
    return Plan(tuple(launches), finish, frozenset(names), dx)


def data_products(p: Problem) -> tuple[tuple[Product, ...], str]:
    """The products that f consists of, in order, and Plan.finish."""
    epilogue = {name: name for name in EPILOGUE if name in p.fields} | {"weight": "weight", "feedback": "feedback"}
    half = p.target.dtype == "float16"
    if p.algorithm == "none":
        return ((Product("f", "x", arguments=epilogue),), "") if "dW" in p.task else ((), "blend")
    if p.algorithm == "input_gram":
        return (Product("gram", p.x, p.x, arguments=_means(p, x="x_mean")),), "input_gram"
    z, unit = {"z_scale": "z_scale"}, {"unit": "z_unit"} if half else {}
    if "amp" in p.fields and "sparse" not in p.fields:
        z |= {"x": p.x, "x_scale": "x_scale", **_means(p, x="x_shift")}
    null = Product("f", "z", "y", z, epilogue | {"scale": "scale"} | unit)
    if p.algorithm == "response_gram" and not _one_pass_tile(p, p.task, null):
        gram = Product("gram", "y", "y", arguments=_means(p, x="y_mean"))
        cross = Product("cross", p.x, "y", arguments=_means(p, x="x_shift", u="y_mean"))
        return (gram, *([cross] if "amp" in p.fields else [])), "response_gram"
    if "sparse" not in p.fields:
        g = p.geometry
        means = ("x_mean", "y_shift") if g.H * g.W * g.C < g.P * g.Q * g.K else ("x_shift", "y_mean")
        response = Product("f", p.x, "y", arguments=_means(p, *means) | epilogue | {"scale": "scale"})
        return (null if "null" in p.fields else response,), ""
    epilogue |= _means(p, x="x_shift") | {"scale": "u_scale"} | ({"unit": "u_unit"} if half else {})
    if "null" not in p.fields:
        return (Product("f", p.x, "u", arguments=epilogue),), ""
    null = null._replace(arguments={**null.arguments, "feedback": "f_sparse", "decay": 1.0, "self_": 0.0})
    null.arguments.pop("tie", None)
    return (Product("f_sparse", p.x, "u", arguments=epilogue), null), ""


def _means(p: Problem, x: str | None = None, u: str | None = None) -> dict[str, Any]:
    """The arguments of a launch that subtract these means from x and u if the rule centers them.

    The sum of (x - s)(y - t) over the samples is that of centered factors if either s or t is the mean, in float32. The
    other may be any value near the mean: a shift, the mean of a few samples, in 16 bits. float32 products show the
    rounding of a mean if the other factor is only shifted, so both are means there.
    """
    if "center" not in p.fields:
        return {}
    exact = p.target.dtype == "float32"
    named = {"mean": x, "u_mean": u}
    named = {name: value.replace("shift", "mean") if exact else value for name, value in named.items() if value}
    return {**named, "sample": p.rows_per_sample * p.geometry.H * p.geometry.W}


def scales(rule, n: int) -> dict[str, float]:
    """The values of the numbers that the launches name, for a rule that reads n samples.

    In wgrad(null z - amp x, y), the first factor is divided by the larger coefficient.
    """
    # Triton compiles a kernel for the value of an int, and for any value of a float.
    named = {"decay": float(rule.decay), "self_": float(rule.self_), "tie": float(rule.tie)}
    amp, null, sparse = float(rule.amp), float(rule.null), float(rule.sparse)
    if sparse:
        named["u_scale"], amp = max(abs(sparse), abs(amp)) / n, 0.0
    if not null:
        return named | {"scale": -amp / n}
    if abs(amp) <= abs(null):
        return named | {"z_scale": 1.0, "x_scale": amp / null, "scale": null / n}
    return named | {"z_scale": -null / amp, "x_scale": -1.0, "scale": -amp / n}


def _launches(p: Problem, remaining: frozenset[str], product: Product) -> tuple[list[Launch], frozenset[str]]:
    """The launches of a product, with the ``remaining`` gradients that they can include; and those then remaining."""
    if tile := _one_pass_tile(p, remaining, product):
        options = product.arguments | (product.z or {}) | ONE_PASS | {"f": product.f}
        if product.term in ("cross", "z"):
            options |= {"y": product.u, "used": p.rows_read}
        if product.term == "z":
            options |= _means(p, u="y_mean")
        options["y_mean"] = options.pop("u_mean", None)
        return [pointwise_launch(p.geometry, p.target, product.term, tile=tile, **options)], frozenset()
    launches = []
    if product.z is not None:
        launch, remaining = _dgrad(p, remaining, product)
        launches.append(launch)
    if "tie" in product.arguments and "dW" in remaining and product.x != "x":  # f reads dW
        before, remaining = _launches(p, remaining, DW_ALONE)
        launches += before
    launch, remaining = _wgrad(p, remaining, product)
    return [*launches, launch], remaining


def _wgrad(p: Problem, remaining: frozenset[str], product: Product) -> tuple[Launch, frozenset[str]]:
    """The weight gradient of a product, with dW if it reads the same x; for a small layer, a joint launch with dx."""
    g, gram = p.geometry, product.term == "gram"
    channels = g.C if gram and product.x != "y" else g.K
    options = {"x": product.x, "u": product.u, "f": product.f, "w_strides": p.strides, **product.arguments}
    options["f_strides"] = (channels if gram else g.C, 0, 0, 1) if product.f in ("gram", "cross") else p.strides
    if gram and (product.x != "x" or channels > SHARED_GRAM_CHANNELS):
        return wgrad_launch(Geometry(p.rows_read, channels, channels), p.target, **options), remaining
    shared = "dW" in remaining and product.x == "x"
    if shared:
        options["a"], remaining = "dy", remaining - {"dW"}
    if shared or "tie" in options:
        options["dw"] = "dW"
    rows = (g.K if shared else 0, channels if product.u else 0)
    tiles = None
    if "dx" in remaining:
        n = p.batch if product.x == "x" else p.samples
        tiles = _joint_tiles(p, remaining, rows, False, n if "sample" in product.arguments else 0)
    n = g.N if product.x == "x" else p.rows_read
    wgrad = wgrad_launch(g._replace(N=n), p.target, u_channels=channels, tile=tiles and tiles[0], **options)
    if tiles is None:
        return wgrad, remaining
    dgrad = dgrad_launch(g, p.target, feedback="B", dy="dy", dx="dx", tile=tiles[1])
    return joint_launch(wgrad, dgrad, p.target.processors), remaining - {"dx"}


def _dgrad(p: Problem, remaining: frozenset[str], product: Product = DW_ALONE) -> tuple[Launch, frozenset[str]]:
    """The input gradient z, dx, or both if z is of the whole batch; for a small layer, a joint launch with dW."""
    g, options, n = p.geometry, {"feedback": "B"}, p.geometry.N
    if product.z is not None:
        options |= {"y": product.u, "z": product.x, "unit": product.arguments.get("unit"), **product.z}
        n = p.rows_read
    if "dx" in remaining and n == g.N:
        options |= {"dy": "dy", "dx": "dx"}
        remaining -= {"dx"}
    tiles = _joint_tiles(p, remaining, (g.K, 0), product.z is not None) if "dW" in remaining else None
    if p.strided and product.z is None and tiles is None:  # a zero for each position that is not read
        dgrad = dgrad_launch(p.strided, p.target, **options)
        flat = {"dy": ((g.N, 1, 1, g.K), p.target.dtype)}  # as other launches read it
        return dgrad._replace(operands=dgrad.operands | flat), remaining
    dgrad = dgrad_launch(g._replace(N=n), p.target, tile=tiles and tiles[1], **options)
    if tiles is None:
        return dgrad, remaining
    wgrad = wgrad_launch(g, p.target, x="x", a="dy", dw="dW", w_strides=p.strides, tile=tiles[0])
    return joint_launch(wgrad, dgrad, p.target.processors), remaining - {"dW"}


def _one_pass_tile(p: Problem, remaining: frozenset[str], product: Product) -> PointwiseTile | None:
    """The tile of one launch for dx, dW and the product, if both are in ``remaining`` and the sums fit."""
    g, (k, _, _, c) = p.geometry, p.strides or (0, 0, 0, 0)
    dense = (g.K == 1 or k == g.C) and (g.C == 1 or c == 1)
    if not (p.fused and remaining == TASK and g.pointwise and dense):
        return None
    # A Gram matrix needs the whole x, and the epilogue reads B itself.
    if product.x not in (("x",) if product.term == "gram" else ("x", "x_used", "z")):
        return None
    if product.arguments.get("feedback", "feedback") != "feedback":
        return None
    centered = product.term != "none" and "center" in p.fields
    return choose_pointwise(g, product.term, p.target, p.batch if centered else 0)


def _joint_tiles(
    p: Problem, remaining: frozenset[str], rows: tuple[int, int], dual: bool, samples: int = 0
) -> tuple[WgradTile, DgradTile] | None:
    """The tiles of a joint launch of a small layer; None if a one-pass launch computes dx and dW."""
    if not p.fused or _one_pass_tile(p, remaining, DW_ALONE):
        return None
    return choose_joint(p.geometry, rows, dual, p.target, samples)
