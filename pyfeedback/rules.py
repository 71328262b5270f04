"""Rules: the coefficients of the primitives, and the presets of the papers."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from pyfeedback.core.coefficients import COEFFICIENTS, READ_DATA, Coefficients, Primitives
from pyfeedback.core.values import check_choice, check_int, check_number, check_positive, describe, is_int, is_number

REDUCTIONS = ("batch", "mean")
SIGNS = ("free", "uniform", "fixed", "batch")
DIRECT = ("no", "each", "shared")
SOURCES = ("data", "probes")
UNITLESS = ("tau", "ratio", "nu")  # the numbers of a rule without units


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
        tau: a number of steps. If it is not 0, the rule has no units: B relaxes in ``tau`` steps to a target of about
            ``ratio`` times the norm of W, with the same setting in every layer and network. The coefficients then only
            say which terms the rule has: amp (wm), amp and null (ia), self_ (sa), amp and sparse (aa) or tie (kp).
            The optimizers of :mod:`pyfeedback.optim` take steps of 1 / tau, whatever their learning rate; under kp they
            set the decay of W and B so that W - B decays in ``tau`` steps. See docs/rules.md.
        growth: let ``tau`` grow to this fraction of the number of steps made. B then follows W closely at the start,
            when W changes fast, and averages over more steps later, whatever the length of the run.
        ratio: the norm of the target relative to W; used with ``tau``.
        nu: the strength of null relative to amp; used with ``tau``.
        source: what amp, null and sparse read. "data": the activations. "probes": white noise of one receptive field,
            drawn for each layer in the optimizer's step. Nothing is saved in the forward pass, and the cost depends on
            neither the batch nor the size of the images.
        probes: the number of probes for each estimate; as a float, relative to the number of inputs d of the layer. 0
            chooses it by d and ``tau`` for a noise of 0.1 radians in the angle of B to its target, but no more than
            cost 2 % of the layer's training step, unless the noise then exceeds 0.3 radians. With sparse (aa), B has
            no noise, and 0 chooses d in ``tau`` steps; with fewer, B relaxes as fast as they allow.
        orthogonal: take the probes of consecutive estimates from one random orthogonal basis, and then from a new one.
            Each direction of the input is probed equally often, so that the same noise takes many times fewer probes.
            A whole basis has no noise, and no estimate takes more.
            By default, probes are independent random signs.
        every: make an estimate from probes in one of ``every`` steps. 0: 20 times in ``tau`` steps.
        name: the name shown in reports.
        fixed: the coefficients in the form that the ops take, or None if they depend on the batch.
        needs_optimizer: whether only the optimizers of :mod:`pyfeedback.optim` can train B: it reads probes, or W must
            decay as well (kp with a ``tau``).
    """

    center: bool = False
    samples: int | float = 0
    reduction: str = "batch"
    transport: bool = False
    signs: str = "free"
    expansion: int = 0
    direct: str = "no"
    tau: float = 0.0
    growth: float = 0.0
    ratio: float = 1.0
    nu: float = 1.0
    source: str = "data"
    probes: int | float = 0
    orthogonal: bool = False
    every: int = 1
    name: str = field(default="custom", compare=False)

    fixed: ClassVar[Coefficients | None] = None
    needs_optimizer: ClassVar[bool] = False

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
        for name, known in (
            ("reduction", REDUCTIONS), ("signs", SIGNS), ("direct", DIRECT), ("source", SOURCES),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), known)
        if not is_int(self.expansion) or self.expansion < 0:
            raise ValueError(f"expansion is {describe(self.expansion)}, expected an int of 0 or more")
        for name in ("samples", "expansion"):
            if is_int(getattr(self, name)):
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("center", "transport", "orthogonal"):
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
        for name in (*UNITLESS, "growth"):
            check_number(name, getattr(self, name))
        self._check_probes()
        if self.tau:
            self._remove_units()
        object.__setattr__(self, "needs_optimizer", self.reads_probes or (self.tau > 0 and self.tie != 0))
        if self.samples == 0 and self.reduction == "batch":
            object.__setattr__(self, "fixed", self.coefficients(1, 1))

    @property
    def learns(self) -> bool:
        """Whether B has a gradient."""
        return any(getattr(self, name) for name in COEFFICIENTS)

    @property
    def has_data_terms(self) -> bool:
        """Whether any term depends on what the layer computes, of the data or of probes."""
        return any(getattr(self, name) for name in READ_DATA)

    @property
    def reads_data(self) -> bool:
        """Whether any term depends on the activations; if not, B, W and the gradient of W suffice."""
        return self.source == "data" and self.has_data_terms

    @property
    def reads_probes(self) -> bool:
        """Whether any term depends on the layer's response to probes."""
        return self.source == "probes"

    @property
    def is_normalized(self) -> bool:
        """Whether each data term is divided by the power of what it reads."""
        return self.tau > 0 and self.has_data_terms

    def coefficients(self, batch: int, positions: int) -> Coefficients:
        """The coefficients that the ops take, for this batch size and ``positions`` output positions per sample."""
        values = {name: getattr(self, name) for name in COEFFICIENTS}
        if self.reduction == "mean" and positions:
            values |= {name: values[name] * (1.0 / positions) for name in READ_DATA}
        if self.expansion:
            values["decay"] = 0.0  # decay acts on the factor that learns, not on the product
        if self.reads_probes:
            return Coefficients()
        samples, normalize = self.samples_of(batch), self.is_normalized
        return Coefficients(**values, center=self.center, samples=samples, normalize=normalize)

    def tau_at(self, step: int) -> float:
        """The time constant in this step, counted from 0; 0 if the rule has units."""
        return max(self.tau, self.growth * step)

    def every_at(self, step: int) -> int:
        """The number of steps for each estimate from probes, in this step."""
        return self.every or max(1, int(self.tau_at(step) / 20))

    def probe_coefficients(self) -> Coefficients:
        """The coefficients of a rule that reads probes."""
        values = {name: getattr(self, name) for name in COEFFICIENTS}
        return Coefficients(**values, normalize=self.is_normalized)

    def samples_of(self, batch: int) -> int:
        """The number of samples that the data terms use for this batch size; 0 means all of them."""
        if isinstance(self.samples, float):
            # 0.07 * 100 is slightly above 7 in float64
            return 0 if self.samples == 1.0 else math.ceil(self.samples * batch - 1e-9)
        return 0 if self.samples >= batch else self.samples

    def _check_probes(self) -> None:
        if is_int(self.every) and self.every == 0 and not self.tau:
            raise ValueError("every is 0, expected 1 or more without a tau")
        for name, least in (("probes", 0), ("every", 0)):
            value = getattr(self, name)
            if name != "probes" or not isinstance(value, float):
                check_int(name, value, least)
            elif not 0 < value < math.inf:
                raise ValueError(f"probes is {value}, expected an int of 0 or more, or a finite float above 0")
        if self.source == "probes":
            if not self.has_data_terms or self.samples or self.tie:
                raise ValueError(f"source is probes in {self}, expected amp, null or sparse, and no samples or tie")
            object.__setattr__(self, "center", False)  # the mean of white noise is 0
        for name in ("growth", "ratio", "nu"):
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and not self.tau:
                raise ValueError(f"{name} is {value} in {self}, expected {default:g} without a tau")
        if self.source == "data" and (self.probes or self.orthogonal or self.every != 1):
            raise ValueError(f"probes, orthogonal or every is set in {self}, expected source='probes'")

    def _remove_units(self) -> None:
        """Replace the coefficients by those that ``tau``, ``ratio`` and ``nu`` stand for."""
        check_positive("tau", self.tau)
        check_positive("ratio", self.ratio)
        terms = frozenset(name for name in COEFFICIENTS if getattr(self, name)) - {"decay"}
        if terms not in _WITH_TAU or self.expansion or self.reduction != "batch":
            what = "the terms of wm, ia, sa, aa or kp, reduction batch and no expansion"
            raise ValueError(f"tau is {self.tau} in {self}, expected {what}")
        if not 0 <= self.growth < 1 or (self.growth and "tie" in terms):
            raise ValueError(f"growth is {self.growth} in {self}, expected a number in [0, 1), and 0 under kp")
        if self.nu < 0 or (self.tau < 1 and "tie" not in terms):
            raise ValueError(f"tau is {self.tau} and nu {self.nu}, expected a tau of 1 or more and a nu of 0 or more")
        found = {"amp": self.ratio, "null": self.nu, "sparse": 1.0, "self_": self.ratio, "tie": 1.0}
        if terms == {"amp", "null"}:
            found["amp"] *= 1 + self.nu
        for name in terms:
            object.__setattr__(self, name, float(found[name]))
        if "tie" not in terms:
            object.__setattr__(self, "decay", 0.0 if "sparse" in terms else 1.0)

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(c for c in changed if not c.startswith('name='))})"


# The terms, besides decay, of the rules that may have a tau.
_WITH_TAU = tuple(map(frozenset, (("amp",), ("amp", "null"), ("self_",), ("amp", "sparse"), ("tie",))))

PRESETS = {
    "bp": Rule(transport=True, name="bp"),
    "fa": Rule(name="fa"),
    "wm": Rule(amp=1e-3, decay=2e-3, center=True, name="wm"),
    "ia": Rule(amp=2e-3, null=2e-3, decay=2e-3, center=True, name="ia"),
    "sa": Rule(self_=2e-3, decay=2e-3, name="sa"),
    "aa": Rule(amp=2e-3, sparse=2e-3, name="aa"),
    "kp": Rule(tie=1.0, decay=2e-3, name="kp"),
    "wm-probes": Rule(amp=1.0, source="probes", orthogonal=True, every=0, tau=5.0, growth=0.02, name="wm-probes"),
    "ia-probes": Rule(
        amp=1.0, null=1.0, source="probes", orthogonal=True, every=0, tau=5.0, growth=0.02, nu=0.5, name="ia-probes"
    ),
    "aa-probes": Rule(
        amp=1.0, sparse=1.0, source="probes", orthogonal=True, every=0, tau=5.0, growth=0.02, name="aa-probes"
    ),
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
    wm-probes, ia-probes        wm and ia that read white        ours, without units
                                noise instead of the data; local
    aa-probes                   aa that reads white noise        ours, without units
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
