"""How feedback weights are drawn: a law, a scale, and what of it is kept."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch import Tensor

from pyfeedback.core.values import check_callable, check_choice, check_number, in_words, is_int, is_number

SIGNS = ("free", "weight")
_seeding = threading.RLock()  # of the global generator, which laws of torch.nn.init draw from


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a feedback weight is drawn.

    Attributes:
        law: fills a tensor in place: any function of torch.nn.init, or one of your own. None is the law of the
            weight: in a fresh layer what torch.nn draws ``weight`` by, in a converted model a normal law of the
            weight's standard deviation.
        scale: multiplies what was drawn.
        density: the fraction of the entries that are kept, chosen at random; the others are zero.
        signs: "weight" gives each entry the sign of the weight's (sign-concordant feedback, Liao et al. 2016);
            "free" leaves it.
        seed: draws the same on every rank, device and call, whatever the global generator's state, which is left
            alone. None draws from the global generator.
    """

    law: Callable[[Tensor], object] | None = None
    scale: float = 1.0
    density: float = 1.0
    signs: str = "free"
    seed: int | None = None

    def __post_init__(self):
        if self.law is not None and not callable(self.law):
            what = "a function that fills a tensor, as those of torch.nn.init"
            raise ValueError(f"law is {in_words(self.law)}, expected {what}")
        check_number("scale", self.scale)
        if not is_number(self.density) or not 0 < self.density <= 1:
            raise ValueError(f"density is {in_words(self.density)}, expected a number above 0, at most 1")
        check_choice("signs", self.signs, SIGNS)
        if self.seed is not None and not (is_int(self.seed) and -(2**63) <= self.seed < 2**63):
            raise ValueError(f"seed is {in_words(self.seed)}, expected an int of 64 bits, or None")

    @torch.no_grad()
    def draw(self, feedback: Tensor, weight: Tensor, default: Callable[[Tensor], object]) -> None:
        """Draw ``feedback`` in place; ``default`` is the law where none was given."""
        if feedback.is_meta:
            return
        if self.seed is None:  # some laws know no 16-bit numbers
            drawn = torch.empty_like(feedback, dtype=torch.promote_types(feedback.dtype, torch.float32))
            self._fill(drawn, weight, default)
            feedback.copy_(drawn)
            return
        drawn, whole = torch.empty(feedback.shape), _whole(weight).detach().to("cpu", torch.float32)
        generator = torch.default_generator  # the CPU's; torch.manual_seed would seed those of every GPU as well
        with _seeding:
            state = generator.get_state()
            generator.manual_seed(self.seed)
            try:
                self._fill(drawn, whole, default)
            finally:
                generator.set_state(state)
        if hasattr(feedback, "placements"):  # sharded: each rank keeps its part of the same draw
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = feedback.device_mesh, feedback.placements  # type: ignore[attr-defined]
            drawn = distribute_tensor(drawn, mesh, placements, src_data_rank=None)
        feedback.copy_(drawn)

    def of_layer(self, name: str) -> "Init":
        """The same with a seed of the layer's own."""
        return self if self.seed is None else replace(self, seed=self.seed + crc32(name.encode()))

    def _fill(self, feedback: Tensor, weight: Tensor, default: Callable[[Tensor], object]) -> None:
        (self.law or default)(feedback)
        if self.scale != 1.0:
            feedback.mul_(self.scale)
        if self.density < 1.0:
            feedback.mul_(torch.rand_like(feedback) < self.density)
        if self.signs == "weight":
            feedback.abs_().mul_(weight.sign())


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that ranks share."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def as_init(init: "Init | Callable[[Tensor], object] | None") -> Init:
    """An :class:`Init`, or the law of one."""
    if init is not None and not isinstance(init, Init):
        check_callable("init", init, "a pyfeedback.Init, or a function that fills a tensor, as those of torch.nn.init")
        return Init(law=init)
    return init or Init()


def fresh(feedback: Tensor) -> None:
    """The law by which torch.nn draws the weight of a fresh layer: uniform, Kaiming with a = sqrt 5."""
    torch.nn.init.kaiming_uniform_(feedback, a=math.sqrt(5))
