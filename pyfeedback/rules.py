"""Rules: the coefficients of the primitives, and the presets of the papers."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from pyfeedback.core.coefficients import COEFFICIENTS, READ_DATA, Coefficients, Primitives
from pyfeedback.core.values import check_choice, describe, is_int, is_number

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
        center: subtract the mean over the samples from the activations in amp, null and sparse, for each position.
        samples: how much of a batch amp, null and sparse use: an int is the maximum number of samples, a float in
            (0, 1] the fraction of the batch, and 0 the whole batch.
        reduction: "batch" sums over positions and averages over samples, as the paper does; "mean" averages over
            positions as well, so that a coefficient has the same meaning in every layer.
        transport: use W itself as B (weight transport): plain backprop.
        signs: give B the signs of W in every pass, with magnitudes that are one number for the whole layer ("uniform"),
            drawn once ("fixed"), or drawn for each batch ("batch"). "free" leaves the signs of B as they are.
        expansion: make B the product of two factors: a fixed random matrix [K, M], where M is ``expansion`` times K,
            and the feedback weight [M, ...], which learns. With 0, B is a single matrix.
        direct: send the error of the model's output to the layer's input through a random projection, and nothing from
            the layers in between. "each" gives every layer its own projection; "shared" gives all layers rows of one.
        name: the name shown in reports.
        fixed: the coefficients in the form that the ops take, or None if they depend on the batch.
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
                raise ValueError(f"{name} is {describe(value)}, expected a finite number")
            if type(value) not in (int, float):  # e.g. a NumPy scalar
                object.__setattr__(self, name, float(value))
        if not (is_int(self.samples) and self.samples >= 0) and not (
            isinstance(self.samples, float) and 0 < self.samples <= 1
        ):
            raise ValueError(f"samples is {describe(self.samples)}, expected an int of 0 or more, or a float in (0, 1]")
        for name, known in (("reduction", REDUCTIONS), ("signs", SIGNS), ("direct", DIRECT)):
            check_choice(name, getattr(self, name), known)
        if not is_int(self.expansion) or self.expansion < 0:
            raise ValueError(f"expansion is {describe(self.expansion)}, expected an int of 0 or more")
        for name in ("samples", "expansion"):
            if is_int(getattr(self, name)):
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("center", "transport"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {describe(getattr(self, name))}, expected True or False")
        if not isinstance(self.name, str):
            raise ValueError(f"name is {describe(self.name)}, expected a string")
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
        """Whether B has a gradient."""
        return any(getattr(self, name) for name in COEFFICIENTS)

    @property
    def reads_data(self) -> bool:
        """Whether any term depends on the activations; if not, B, W and the gradient of W suffice."""
        return any(getattr(self, name) for name in READ_DATA)

    def coefficients(self, batch: int, positions: int) -> Coefficients:
        """The coefficients that the ops take, for this batch size and ``positions`` output positions per sample."""
        values = {name: getattr(self, name) for name in COEFFICIENTS}
        if self.reduction == "mean" and positions:
            values |= {name: values[name] * (1.0 / positions) for name in READ_DATA}
        if self.expansion:
            values["decay"] = 0.0  # decay acts on the factor that learns, not on the product
        return Coefficients(**values, center=self.center, samples=self.samples_of(batch))

    def samples_of(self, batch: int) -> int:
        """The number of samples that the data terms use for this batch size; 0 means all of them."""
        if isinstance(self.samples, float):
            # 0.07 * 100 is slightly above 7 in float64
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
    """Return a rule by name, with some fields of :class:`Rule` overridden: ``rule("ia", null=1e-3, samples=0.125)``.

    ==== ====================== ================================ =====================================
    name rule                   primitives                       the authors' coefficients
    ==== ====================== ================================ =====================================
    bp   backprop               none: the feedback is W itself
    fa   feedback alignment     none: B keeps its initial value
    wm   weight mirror          amp, decay; local                1e-3, 2e-3, centered
    ia   information alignment  amp, null, decay; local          2e-3, 2e-3, 2e-3, centered
    sa   symmetric alignment    self_, decay                     2e-3, 2e-3: 1e-3 |W - B|^2
    aa   activation alignment   amp, sparse                      2e-3, 2e-3: 1e-3 E|Wx - Bx|^2
    kp   Kolen-Pollack          tie, decay                       1, 2e-3; W must decay at the same rate
    oja  Oja's rule             amp, null, equal; local          ours: those of ia without decay
    usf  uniform sign-          none: B has the sign of W, and
         concordant feedback    one magnitude
    frsf fixed random           none: as usf, with magnitudes
         magnitude              drawn once
    brsf batch random           none: as usf, with magnitudes
         magnitude              drawn for each pass
    pfa  product feedback       B = P R, P fixed and random; R   ours: those of kp, with four times as
         alignment              learns by tie, decay             many rows in R as in W
    dfa  direct feedback        none: the output's error goes
         alignment              through a random projection
    ==== ====================== ================================ =====================================

    Without centering, wm and ia diverge on real images. The paper's coefficients are for its own ImageNet recipe.

    Source: Kunin et al., ICML 2020 (arXiv 2003.01513), table 1; wm and kp: Akrout et al., NeurIPS 2019; usf, frsf and
    brsf: Liao, Leibo and Poggio, AAAI 2016 (arXiv 1510.05067); pfa: Li and Benna, 2024 (arXiv 2405.20594); dfa:
    Nokland, NeurIPS 2016 (arXiv 1609.01596).

    Raises:
        ValueError: no rule has this name, or the value of a field is invalid.
        TypeError: ``overrides`` has a name that is not a field.
    """
    if not isinstance(name, (str, Rule)):
        raise ValueError(f"rule is {describe(name)}, expected a name or a pyfeedback.Rule")
    if isinstance(name, str) and name not in PRESETS:
        raise ValueError(f"rule is {describe(name)}, expected one of {', '.join(PRESETS)}, or a pyfeedback.Rule")
    for field_name in overrides:
        if field_name not in Rule.__dataclass_fields__:
            raise TypeError(
                f"{field_name} is not a field of a rule, expected one of {', '.join(Rule.__dataclass_fields__)}"
            )
    return replace(PRESETS[name] if isinstance(name, str) else name, **overrides)
