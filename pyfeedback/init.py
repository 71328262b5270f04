"""Initialization of feedback weights: a distribution, a scale, a density and signs."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from pyfeedback.core.deprecation import renamed_attribute, renamed_keyword
from pyfeedback.core.tensors import shard_like, unsharded
from pyfeedback.core.values import check_callable, check_choice, check_number, describe, is_int, is_number

SIGNS = ("free", "weight")
_seeding = threading.RLock()  # held while the global generator, which torch.nn.init draws from, has another seed


@dataclass(frozen=True, kw_only=True)
class Init:
    """The initialization of a feedback weight.

    Attributes:
        init_fn: a function that fills a tensor in place, such as those of torch.nn.init. None follows the weight:
            a new layer uses the initialization that torch.nn uses for ``weight``, a converted layer a normal
            distribution with the standard deviation of its weight.
        scale: a factor applied to the values drawn.
        density: the fraction of the entries to keep, chosen at random; the others are set to zero.
        signs: "weight" gives each entry the sign of the corresponding entry of the weight (sign-concordant feedback,
            Liao et al. 2016); "free" leaves the signs as drawn.
        seed: makes the values the same on every rank, device and call. The global generator keeps its state. None
            draws from the global generator.
    """

    init_fn: Callable[[Tensor], object] | None = None
    scale: float = 1.0
    density: float = 1.0
    signs: str = "free"
    seed: int | None = None

    law = renamed_attribute("law", "init_fn")

    def __post_init__(self):
        if self.init_fn is not None and not callable(self.init_fn):
            what = "a function that fills a tensor, like those of torch.nn.init"
            raise ValueError(f"init_fn is {describe(self.init_fn)}, expected {what}")
        check_number("scale", self.scale)
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(f"density is {describe(self.density)}, expected a number above 0 and at most 1")
        check_choice("signs", self.signs, SIGNS)
        if self.seed is not None and not (is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed is {describe(self.seed)}, expected a 64-bit int or None")

    @torch.no_grad()
    def draw(self, feedback: Tensor, weight: Tensor, default: Callable[[Tensor], object]) -> None:
        """Initialize ``feedback`` in place; ``default`` replaces an ``init_fn`` of None."""
        if feedback.is_meta or not feedback.numel():
            return
        if self.seed is None:  # some functions of torch.nn.init do not support 16-bit dtypes
            drawn = torch.empty_like(feedback, dtype=torch.promote_types(feedback.dtype, torch.float32))
            self._fill(drawn, weight, default)
            feedback.copy_(drawn)
            return
        drawn, whole = torch.empty(feedback.shape), unsharded(weight).detach().to("cpu", torch.float32)
        generator = torch.default_generator  # of the CPU; torch.manual_seed would seed every GPU as well
        with _seeding:
            state = generator.get_state()
            generator.manual_seed(self.seed)
            try:
                self._fill(drawn, whole, default)
            finally:
                generator.set_state(state)
        feedback.copy_(shard_like(drawn, feedback))  # every rank draws the same values

    def of_layer(self, name: str) -> "Init":
        """The same initialization with a seed that is specific to the layer ``name``."""
        return self if self.seed is None else replace(self, seed=self.seed + crc32(name.encode()))

    def _fill(self, feedback: Tensor, weight: Tensor, default: Callable[[Tensor], object]) -> None:
        (self.init_fn or default)(feedback)
        if self.scale != 1.0:
            feedback.mul_(self.scale)
        if self.density < 1.0:
            feedback.mul_(torch.rand_like(feedback) < self.density)
        if self.signs == "weight":
            feedback.abs_().mul_(weight.sign())


Init.__init__ = renamed_keyword("law", "init_fn")(Init.__init__)  # type: ignore[method-assign]


def as_init(init: "Init | Callable[[Tensor], object] | None") -> Init:
    """Convert an argument ``init`` to an :class:`Init`: a function becomes its ``init_fn``, None the default."""
    if init is not None and not isinstance(init, Init):
        what = "a pyfeedback.Init, or a function that fills a tensor, like those of torch.nn.init"
        check_callable("init", init, what)
        return Init(init_fn=init)
    return init or Init()


def default_init_(feedback: Tensor) -> None:
    """Initialize as torch.nn initializes the weight of a new layer: Kaiming uniform with a = sqrt(5)."""
    torch.nn.init.kaiming_uniform_(feedback, a=math.sqrt(5))
