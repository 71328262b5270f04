"""Rules: coefficients of the primitives, with the paper's presets."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from pyfeedback.core.coefficients import COEFFICIENTS, READ_DATA, Coefficients, Primitives
from pyfeedback.core.values import check_choice, in_words, is_int, is_number

REDUCTIONS = ("batch", "mean")
SIGNS = ("free", "uniform", "fixed", "batch")
DIRECT = ("no", "each", "shared")


@dataclass(frozen=True, kw_only=True)
class Rule(Primitives):
    """How a layer's feedback weight B learns; the formula is in :func:`pyfeedback.functional.fa_conv2d`.

    Attributes:
        decay: pulls B toward zero.
        amp: rewards agreement of conv(x, B) with the response y; local.
        null: keeps conv_transpose(y, B) small; local.
        sparse: keeps conv(x, B) small; weight estimation.
        self_: pulls B toward W; weight estimation.
        tie: adds the gradient of the weight; weight estimation.
        center: amp, null and sparse see activations minus their mean over the samples, position by position.
        samples: how much of a batch amp, null and sparse see: an int is at most so many samples, a float in (0, 1]
            that fraction of the batch, 0 all of it.
        reduction: "batch" sums over positions and averages over samples, as the paper does; "mean" averages over
            positions as well, so that a coefficient has the same meaning in every layer.
        transport: B is W itself, weight transport: plain backprop.
        signs: B has the sign of W in every pass, and magnitudes of its own: one for the whole layer ("uniform"), drawn
            once ("fixed") or for each batch ("batch"). "free" leaves the signs to B.
        expansion: B is a product of two factors: a fixed random matrix [K, M], M this many times K, and the feedback
            weight [M, ...], which learns. 0 is one matrix.
        direct: the input of the layer receives the error of the model's output through a random projection, and nothing
            from the layers between: "each" layer has its own projection, or all take rows of one, "shared".
        name: for reports.
        fixed: the coefficients as the ops take them, where they do not depend on the batch; else None.
    """

    center: bool = False
    samples: int | float = 0
    reduction: str = "batch"
    transport: bool = False
    signs: str = "free"
    expansion: int = 0
    direct: str = "no"
    name: str = field(default="custom", compare=False)

    fixed: ClassVar[Coefficients | None] = None

    def __post_init__(self):
        for name in COEFFICIENTS:
            value = getattr(self, name)
            if not is_number(value) or not math.isfinite(value):
                raise ValueError(f"{name} is {in_words(value)}, expected a finite number")
            if type(value) not in (int, float):  # of numpy
                object.__setattr__(self, name, float(value))
        if not (is_int(self.samples) and self.samples >= 0) and not (
            isinstance(self.samples, float) and 0 < self.samples <= 1
        ):
            raise ValueError(f"samples is {in_words(self.samples)}, expected an int of 0 or more, or a float in (0, 1]")
        for name, known in (("reduction", REDUCTIONS), ("signs", SIGNS), ("direct", DIRECT)):
            check_choice(name, getattr(self, name), known)
        if not is_int(self.expansion) or self.expansion < 0:
            raise ValueError(f"expansion is {in_words(self.expansion)}, expected an int of 0 or more")
        for name in ("samples", "expansion"):
            if is_int(getattr(self, name)):
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("center", "transport"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {in_words(getattr(self, name))}, expected True or False")
        if not isinstance(self.name, str):
            raise ValueError(f"name is {in_words(self.name)}, expected a string")
        if self.transport and (self.learns or self.samples or self.center):
            raise ValueError(f"transport is True with {self!r}, expected no coefficients: B is W itself")
        if self.learns and (self.signs != "free" or self.direct != "no"):
            raise ValueError(f"signs is {self.signs} and direct {self.direct} in {self}, expected no coefficients")
        if (self.transport, self.signs != "free", self.direct != "no", self.expansion > 0).count(True) > 1:
            raise ValueError(f"{self} has more than one of transport, signs, direct and expansion, expected one")
        if self.expansion and (self.reads_data or self.self_):
            raise ValueError(f"expansion is {self.expansion} in {self}, expected no coefficients but tie and decay")
        if self.samples == 0 and self.reduction == "batch":
            object.__setattr__(self, "fixed", self.coefficients(1, 1))

    @property
    def learns(self) -> bool:
        """True where B has a gradient at all."""
        return any(getattr(self, name) for name in COEFFICIENTS)

    @property
    def reads_data(self) -> bool:
        """True where some term depends on the activations; False where B, W and the gradient of W suffice."""
        return any(getattr(self, name) for name in READ_DATA)

    def coefficients(self, batch: int, positions: int) -> Coefficients:
        """The rule as the ops take it, for a batch of this size and ``positions`` output positions per sample."""
        values = {name: getattr(self, name) for name in COEFFICIENTS}
        if self.reduction == "mean" and positions:
            values |= {name: values[name] * (1.0 / positions) for name in READ_DATA}
        if self.expansion:
            values["decay"] = 0.0  # acts on the factor that learns, not on the product
        return Coefficients(**values, center=self.center, samples=self.samples_of(batch))

    def samples_of(self, batch: int) -> int:
        """How many samples of a batch of this size the data terms look at; 0 is all of them."""
        if isinstance(self.samples, float):
            # 0.07 * 100 is a little above 7
            return 0 if self.samples == 1.0 else math.ceil(self.samples * batch - 1e-9)
        return 0 if self.samples >= batch else self.samples

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(c for c in changed if not c.startswith('name='))})"


PRESETS = {
    "bp": Rule(transport=True, name="bp"),
    "fa": Rule(name="fa"),
    "wm": Rule(amp=1e-3, decay=2e-3, center=True, name="wm"),
    "ia": Rule(amp=2e-3, null=2e-3, decay=2e-3, center=True, name="ia"),
    "sa": Rule(self_=2e-3, decay=2e-3, name="sa"),
    "aa": Rule(amp=2e-3, sparse=2e-3, name="aa"),
    "kp": Rule(tie=1.0, decay=2e-3, name="kp"),
    "oja": Rule(amp=2e-3, null=2e-3, center=True, name="oja"),
    "usf": Rule(signs="uniform", name="usf"),
    "frsf": Rule(signs="fixed", name="frsf"),
    "brsf": Rule(signs="batch", name="brsf"),
    "pfa": Rule(tie=1.0, decay=2e-3, expansion=4, name="pfa"),
    "dfa": Rule(direct="each", name="dfa"),
}


def rule(name: str | Rule, **overrides) -> Rule:
    """A rule by name, with fields of :class:`Rule` overridden: ``rule("ia", null=1e-3, samples=0.125)``.

    ==== ====================== ================================ =====================================
    name rule                   primitives                       the authors' coefficients
    ==== ====================== ================================ =====================================
    bp   backprop               none: the feedback is W itself
    fa   feedback alignment     none: B stays as it was drawn
    wm   weight mirror          amp, decay; local                1e-3, 2e-3, centred
    ia   information alignment  amp, null, decay; local          2e-3, 2e-3, 2e-3, centred
    sa   symmetric alignment    self_, decay                     2e-3, 2e-3: 1e-3 |W - B|^2
    aa   activation alignment   amp, sparse                      2e-3, 2e-3: 1e-3 E|Wx - Bx|^2
    kp   Kolen-Pollack          tie, decay                       1, 2e-3; W must decay at the same rate
    oja  Oja's rule             amp, null, equal; local          ours: those of ia without decay
    usf  uniform sign-          none: B has the sign of W, and
         concordant feedback    one magnitude
    frsf fixed random           likewise, magnitudes as drawn
         magnitude
    brsf batch random           likewise, drawn for each pass
         magnitude
    pfa  product feedback       B = P R, P fixed and random; R   ours: those of kp, four times as many
         alignment              learns by tie, decay             rows in R as in W
    dfa  direct feedback        none: the output's error, by a
         alignment              random projection
    ==== ====================== ================================ =====================================

    Without centring, wm and ia diverge on real images; the paper's coefficients are for its own ImageNet recipe.

    Source: Kunin et al., ICML 2020 (arXiv 2003.01513), table 1; wm and kp: Akrout et al., NeurIPS 2019; usf, frsf and
    brsf: Liao, Leibo and Poggio, AAAI 2016 (arXiv 1510.05067); pfa: Li and Benna, 2024 (arXiv 2405.20594); dfa:
    Nokland, NeurIPS 2016 (arXiv 1609.01596).

    Raises:
        ValueError: no rule has this name, or a field's value is out of range.
        TypeError: a field that is none.
    """
    if not isinstance(name, (str, Rule)):
        raise ValueError(f"rule is {in_words(name)}, expected a name or a pyfeedback.Rule")
    if isinstance(name, str) and name not in PRESETS:
        raise ValueError(f"rule is {in_words(name)}, expected one of {', '.join(PRESETS)}, or a pyfeedback.Rule")
    for field_name in overrides:
        if field_name not in Rule.__dataclass_fields__:
            raise TypeError(
                f"{field_name} is no field of a rule, expected one of {', '.join(Rule.__dataclass_fields__)}"
            )
    return replace(PRESETS[name] if isinstance(name, str) else name, **overrides)
