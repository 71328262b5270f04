"""Do the rules scale with depth under one setting? Residual networks with 8 to 32 layers, plain ones with 7 and 13.

    python examples/depth_study.py --root data --minutes 60    # go on with the study for an hour
    python examples/depth_study.py --network resnet20 --rule bp kp    # only these test runs
    python examples/depth_study.py --report                    # tables and figures of the runs that are done
    python examples/depth_study.py --quick                     # a small version in two minutes: it shows that it runs

Networks: those of image_networks.py with 8 channels. ResNets have projection shortcuts, a scale of 0 in the last batch
norm of each block, and here a stem of stride 2, so that 32x32 images become 16x16 and a run takes less than a minute.

Data: the cluttered digits (6,000 training and 2,000 test images, see cluttered_digits.py), and as many images of
Fashion-MNIST (see image_data.py for the command that downloads them to the folder ``--root``).

Training: 8 epochs with batches of 64 images, SGD with a learning rate of 0.05 and momentum 0.9, a linear warm-up of 50
steps and a cosine schedule. Under every rule, also under backprop, the weights that a batch norm follows start at 0.1
times their usual size. The batch norm cancels the factor, so the function of the network is the same. Only the body of
a network has feedback weights; the stem does not need them. The optimizer is pyfeedback.optim.SGD, under backprop
torch.optim.SGD. A seed gives the same initial weights and the same order of images under every rule.

Rules: backprop (bp), feedback alignment (fa), and the rules without units (docs/rules.md): sa, kp and aa, which
estimate the weight, and the local rules wm and ia. aa reads centered activations. wm and ia are the presets wm-probes
and ia-probes, which read white noise of one receptive field, as does the preset aa-probes. For comparison, wm and ia
also read activations ("data"), with the same numbers and in two networks.

Selection: one setting of each rule for all networks and data, by the accuracy of ResNet-8 on validation images of the
cluttered digits, one sixth of the training digits (mean of two seeds). Every rule has four candidates. Those of bp and
fa are weight decays, and the best one of bp is used by the other rules too. Under kp, the time constant determines the
decay of each weight that has a feedback weight, and all other parameters have the weight decay of bp. No test image is
read before a setting is chosen.

Test: five seeds; twenty for bp, sa, kp and ia-probes in the residual networks, whose gaps are to be resolved to one
point. Under bp, sa and kp, six seeds also train for 24 epochs, with the same settings, in the three networks where
8 epochs left the gap of sa or kp open. The runs go seed by seed, so that an interrupted study has the same number of
seeds everywhere. Each finished run is appended to runs.jsonl in the folder ``--out`` with all its settings. Runs that
are there are not repeated; runs that are missing are not in the tables.
"""

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import depth_study_report
import study_options
from depth_study_report import Group
from depth_study_runs import Job, Outcome, Runs, Setting
from two_routes import Parser

import pyfeedback

WEIGHT_DECAYS = (0.001, 0.002, 0.004, 0.008)
TAUS = {  # of the rules with one number
    "sa": (2.0, 4.0, 8.0, 16.0),
    "kp": (50.0, 100.0, 200.0, 400.0),
    "aa": (1.0, 1.5, 2.0, 4.0),
}
PROBES = {  # nu and growth of the presets that read probes
    "wm-probes": ((0.0, 0.01), (0.0, 0.02), (0.0, 0.04), (0.0, 0.08)),
    "aa-probes": ((0.0, 0.01), (0.0, 0.02), (0.0, 0.04), (0.0, 0.08)),
    "ia-probes": ((1.0, 0.02), (1.0, 0.04), (0.5, 0.02), (0.5, 0.04)),
}
RULES = ("bp", "fa", "sa", "kp", "aa", "ia-probes", "wm-probes", "aa-probes")
DATA_RULES = ("ia-data", "wm-data")  # with the settings of the same rules with probes
RESOLVED = ("bp", "sa", "kp", "ia-probes")  # rules with more seeds, in some networks
FOLDER = Path(__file__).parent.parent / "docs" / "depth_study"


@dataclass(frozen=True)
class Case:
    """A network and a data set to test the rules with.

    Attributes:
        rules: all rules of the test.
        resolved: of the rules, those with more seeds.
        seeds: the number of seeds of the other rules; None for the number of the study.
        longer: how many times longer the training takes than in the search.
    """

    network: str
    data: str = "cluttered"
    rules: tuple[str, ...] = RULES
    resolved: tuple[str, ...] = ()
    seeds: int | None = None
    longer: int = 1


CASES = (
    Case("resnet8", rules=RULES + DATA_RULES, resolved=RESOLVED),
    Case("resnet20", rules=RULES + DATA_RULES, resolved=RESOLVED),
    Case("resnet14", resolved=RESOLVED),
    Case("resnet32", resolved=RESOLVED),
    Case("resnet20", "fashion-mnist"),
    Case("plain7"),
    Case("plain13"),
    *(Case(network, rules=("bp", "sa", "kp"), seeds=6, longer=3) for network in ("resnet8", "resnet20", "resnet32")),
)


@dataclass(frozen=True)
class Scale:
    """The size of a study."""

    cases: tuple[Case, ...] = CASES
    search_seeds: int = 2
    candidates: int = 4  # of each rule
    seeds: int = 5
    more_seeds: int = 20  # of the rules of Case.resolved
    epochs: int = 8
    train_size: int = 6000
    test_size: int = 2000
    width: int = 8

    def job(self, setting: Setting, case: Case, seed: int, validation: bool = False) -> Job:
        sizes = {name: getattr(self, name) for name in ("train_size", "test_size", "width")}
        return Job(setting, case.network, case.data, seed, validation, epochs=self.epochs * case.longer, **sizes)

    def group(self, case: Case, rule: str) -> Group:
        return Group(case.network, case.data, rule, self.epochs * case.longer)

    def seeds_of(self, case: Case, rule: str) -> int:
        if rule in case.resolved:
            return self.more_seeds
        return self.seeds if case.seeds is None else case.seeds

    @property
    def most_seeds(self) -> int:
        return max(self.seeds_of(case, rule) for case in self.cases for rule in case.rules)

    def search_jobs(self, setting: Setting) -> list[Job]:
        return [self.job(setting, self.cases[0], seed, validation=True) for seed in range(self.search_seeds)]


QUICK = Scale(
    cases=(Case("resnet8", rules=RULES + DATA_RULES), Case("resnet14"), Case("plain7")), search_seeds=1, candidates=2,
    seeds=2, more_seeds=2, epochs=2, train_size=640, test_size=500,
)  # fmt: skip


def candidates(name: str, weight_decay: float) -> list[Setting]:
    """The four settings of a rule to choose from; ``weight_decay`` is the choice of bp."""
    if name in ("bp", "fa"):
        return [Setting(name, decay) for decay in WEIGHT_DECAYS]
    if name in PROBES:
        tau = pyfeedback.rule(name).tau
        return [Setting(name, weight_decay, tau, nu, growth) for nu, growth in PROBES[name]]
    return [Setting(name, weight_decay, tau) for tau in TAUS[name]]


def choose(scale: Scale, runs: Runs, tried: Sequence[Setting]) -> Setting | None:
    """The candidate with the highest validation accuracy; None if one of them is not done."""
    found = {setting: runs.of(scale.search_jobs(setting)) for setting in tried}
    if any(len(outcomes) < scale.search_seeds for outcomes in found.values()):
        return None
    return max(tried, key=lambda setting: math.fsum(outcome.accuracy[-1] for outcome in found[setting]))


def search(scale: Scale, runs: Runs) -> dict[str, Setting]:
    """The setting of each rule whose candidates are all done."""
    chosen: dict[str, Setting] = {}
    for names in (("bp",), RULES[1:]):
        decay = chosen["bp"].weight_decay if "bp" in chosen else 0.0
        tried = {name: candidates(name, decay)[: scale.candidates] for name in names}
        everything = itertools.chain(*tried.values())
        runs.do(f"search {names[0]}", [job for setting in everything for job in scale.search_jobs(setting)])
        chosen |= {name: best for name in names if (best := choose(scale, runs, tried[name])) is not None}
        if "bp" not in chosen:
            return {}
    for name in DATA_RULES:
        if (same := chosen.get(name.replace("data", "probes"))) is not None:
            chosen[name] = replace(same, name=name)
    return chosen


@dataclass(frozen=True)
class Wanted:
    """The test runs to do: of these networks, data sets, rules and epochs, or of all where nothing is given."""

    networks: Sequence[str] = ()
    data: Sequence[str] = ()
    rules: Sequence[str] = ()
    epochs: Sequence[int] = ()

    def __contains__(self, group: Group) -> bool:
        wanted = (self.networks, self.data, self.rules, self.epochs)
        return all(not names or name in names for name, names in zip(group, wanted, strict=True))


EVERYTHING = Wanted()


def jobs_of_test(scale: Scale, chosen: dict[str, Setting], wanted: Wanted = EVERYTHING) -> list[Job]:
    """The test runs of all rules with a setting, in their order."""
    return [
        scale.job(chosen[name], case, seed)
        for seed in range(scale.most_seeds)
        for case in scale.cases
        for name in case.rules
        if seed < scale.seeds_of(case, name) and name in chosen and scale.group(case, name) in wanted
    ]


def study(scale: Scale, runs: Runs, out: Path, wanted: Wanted = EVERYTHING) -> None:
    """Do the runs that are missing, as far as the time allows, and write tables and figures of those that are done."""
    chosen = search(scale, runs)
    runs.do("test", jobs_of_test(scale, chosen, wanted))
    decay = chosen["bp"].weight_decay if "bp" in chosen else 0.0
    tried = [s for name in RULES if name in ("bp", *chosen) for s in candidates(name, decay)[: scale.candidates]]
    depth_study_report.write(
        {s: runs.of(scale.search_jobs(s)) for s in tried}, chosen, results(scale, runs, chosen), out
    )


def results(scale: Scale, runs: Runs, chosen: dict[str, Setting]) -> dict[Group, list[Outcome | None]]:
    """The outcome of each seed by network, data, rule and epochs; None if it is missing."""
    return {
        scale.group(case, name): [runs[scale.job(chosen[name], case, seed)] for seed in range(scale.most_seeds)]
        for case in scale.cases
        for name in case.rules
        if name in chosen
    }


def parse() -> argparse.Namespace:
    def minutes(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
        return value

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few seeds, networks, images and epochs")
    parser.add_argument(
        "--minutes", type=minutes, default=math.inf, help="start no run after this time; default: no limit"
    )
    every = (
        {case.network: None for case in CASES},
        {case.data: None for case in CASES},
        dict.fromkeys(RULES + DATA_RULES),
        {Scale.epochs * case.longer: None for case in CASES},
    )
    for name, known in zip(("network", "data", "rule", "epochs"), every, strict=True):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, type=type(next(iter(known))), default=[], metavar=name.upper(),
            help=f"test only these: {', '.join(map(str, known))}",
        )  # fmt: skip
    return study_options.parse(parser, FOLDER, workers=2)


def main() -> None:
    options = parse()
    scale, path = QUICK if options.quick else Scale(), options.out / "runs.jsonl"
    start = time.perf_counter()
    try:
        with Runs(path, 0 if options.report else options.workers, options.root, options.minutes) as runs:
            study(scale, runs, options.out, Wanted(options.network, options.data, options.rule, options.epochs))
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted: {path} keeps what is done, start again to go on") from None
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes; figures and tables are in {options.out}")


if __name__ == "__main__":
    main()
