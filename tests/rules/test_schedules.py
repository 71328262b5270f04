"""Rules over time: curves, schedules, alternation, warm-up and growth control."""

import pytest
import torch
from cases import largest_error
from small_networks import convnet

import pyfeedback
from pyfeedback import schedules
from pyfeedback.schedules import Alternation, GrowthControl, Schedule, alignment_only


def network(rule="ia", **options):
    return pyfeedback.convert(convnet(channels=8, side=6), pyfeedback.rule(rule, **options))


def backward(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = None
    model(torch.randn(4, 2, 6, 6)).square().sum().backward()


def test_curves():
    def values(curve, *steps):
        return [curve(step) for step in steps]

    assert values(schedules.constant(3.0), 0, 7) == [3.0, 3.0]
    assert values(schedules.linear(1.0, 3.0, 4), 0, 1, 4, 9) == [1.0, 1.5, 3.0, 3.0]
    assert values(schedules.exponential(1.0, 0.25, 4), 0, 2, 4, 9) == [1.0, 0.5, 0.25, 0.25]
    assert values(schedules.cyclic(1.0, 3.0, 8), 0, 4, 8) == [1.0, 3.0, 1.0]
    assert schedules.cyclic(1.0, 3.0, 8)(2) == pytest.approx(2.0)
    assert values(schedules.between(2, 4), 0, 1, 2, 3, 4) == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert values(schedules.between(2, 9, schedules.linear(0, 1, 2)), 1, 2, 3, 4) == [0.0, 0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="start and end are 1 and -1, expected two numbers of the same sign"):
        schedules.exponential(1, -1, 3)


def test_a_schedule_multiplies_each_layers_own_coefficients():
    model = network("wm", amp=0.4)
    model[3].rule = pyfeedback.rule("aa", amp=0.1)
    schedule = Schedule(model, amp=schedules.linear(1.0, 0.0, 2), decay=schedules.constant(3.0))
    amps = []
    for _ in range(3):
        amps.append((model[0].rule.amp, model[3].rule.amp))
        assert model[0].rule.decay == pytest.approx(3 * pyfeedback.rule("wm").decay)
        schedule.step()
    assert amps == [(0.4, 0.1), (0.2, 0.05), (0.0, 0.0)]
    assert schedule.factors() == {"amp": 0.0, "decay": 3.0}


def test_gradients_follow_the_schedule():
    model, still = network("wm", decay=0.0), network("wm", decay=0.0)
    still.load_state_dict(model.state_dict())
    schedule = Schedule(model, amp=schedules.linear(1.0, 0.5, 1))
    schedule.step()
    for each in (model, still):
        backward(each)
    for a, b in zip(pyfeedback.feedback_parameters(model), pyfeedback.feedback_parameters(still), strict=True):
        torch.testing.assert_close(a.grad, 0.5 * b.grad)


def test_a_schedule_resumes_from_its_state_dict():
    first = Schedule(model := network(), null=schedules.linear(0.0, 1.0, 10))
    for _ in range(4):
        first.step()
    wanted = model[0].rule
    Schedule(again := network(), null=schedules.linear(0.0, 1.0, 10)).load_state_dict(first.state_dict())
    assert again[0].rule == wanted


@pytest.mark.parametrize("fused", [False, True], ids=["SGD", "FeedbackSGD"])
def test_a_rule_that_starts_at_zero_learns_from_its_start(fused):
    model = network("wm", amp=0.4)
    window = schedules.between(2, 4)
    schedule = Schedule(model, amp=window, decay=window)
    make = pyfeedback.optim.FeedbackSGD if fused else lambda m, lr: torch.optim.SGD(m.parameters(), lr)
    optimizer = make(model, lr=0.1)
    moved = []
    for step in range(6):
        before = model[0].feedback.detach().clone()
        backward(model, step)
        optimizer.step()
        schedule.step()
        moved.append(not torch.equal(model[0].feedback, before))
    assert moved == [False, False, True, True, False, False]


def test_a_second_schedule_replaces_the_first_and_converting_ends_it():
    model = network("wm", amp=0.4)
    Schedule(model, amp=schedules.constant(0.5))
    Schedule(model, amp=schedules.constant(0.25))
    assert model[0].rule.amp == pytest.approx(0.1)
    pyfeedback.convert(model, "wm")
    assert model[0].rule == pyfeedback.rule("wm")
    assert model[0].scheduled is None


@pytest.mark.parametrize(
    ("curves", "message"),
    [({"gamma": schedules.constant(1)}, "gamma is not a coefficient"), ({"amp": 3}, "amp is 3, expected a function")],
)
def test_a_schedule_refuses_invalid_curves(curves, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Schedule(network(), **curves)


def test_alternation_aligns_at_the_last_of_k_steps():
    model = network("ia")
    alternation = Alternation(model, every=3)
    seen = []
    for _ in range(6):
        backward(model)
        learned = [p.grad is not None for p in pyfeedback.feedback_parameters(model)]
        assert all(learned) == any(learned) == alternation.aligns
        assert all(p.grad is not None for p in pyfeedback.forward_parameters(model))
        seen.append(alternation.aligns)
        alternation.step()
    assert seen == [False, False, True] * 2
    with pytest.raises(ValueError, match="every is 0, expected 1 or more"):
        Alternation(model, 0)


def test_a_later_schedule_replaces_the_earlier_one(caplog):
    model = network("ia")
    rule = model[0].rule
    first = Schedule(model, amp=schedules.constant(2.0))
    assert not caplog.messages
    second = Schedule(model, null=schedules.constant(3.0))
    assert caplog.messages == [
        "the earlier Schedule of this model has no effect any more: give all curves to one Schedule"
    ]
    first.step()
    assert (model[0].rule.amp, model[0].rule.null) == (rule.amp, 3 * rule.null)
    second.step()
    assert (model[0].rule.amp, model[0].rule.null) == (rule.amp, 3 * rule.null)


def test_schedules_leave_layers_that_were_converted_again_or_back():
    for convert in (lambda model: pyfeedback.convert(model, "sa"), pyfeedback.unconvert):
        model = network("ia")
        schedule, alternation = Schedule(model, amp=schedules.constant(2.0)), Alternation(model, 2)
        expected = set(vars(convert(model)[0]))
        schedule.step(), alternation.step()
        assert set(vars(model[0])) == expected
        assert "rule" not in expected or model[0].rule == pyfeedback.rule("sa")


def test_a_schedule_with_an_invalid_rule_changes_nothing():
    model = pyfeedback.convert(
        convnet(channels=8, side=6), {"0": pyfeedback.rule("sa", tau=8), "*": pyfeedback.rule("sa", tau=2)}
    )
    with pytest.raises(ValueError, match=r"tau is 0\.5 and nu 1\.0, expected a tau of 1 or more"):
        Schedule(model, tau=schedules.constant(0.25))
    assert [layer.rule.tau for _, layer in pyfeedback.feedback_layers(model)][:2] == [8, 2]
    assert all(layer.unscheduled is None for _, layer in pyfeedback.feedback_layers(model))


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "follow"])
@pytest.mark.parametrize("rule", ["ia", "sa", "kp", "pfa", "ia-probes"])
def test_alternation_with_an_optimizer_of_the_whole_model(rule, kind, caplog):
    model = network(rule)
    if kind == "follow":
        optimizer = torch.optim.SGD(pyfeedback.forward_parameters(model), lr=0.01)
        pyfeedback.optim.follow(optimizer, model)
    else:
        optimizer = getattr(pyfeedback.optim, kind)(model, lr=0.01)
    alternation = Alternation(model, every=4)
    for _ in range(8):
        backward(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (name.endswith("feedback") and not alternation.aligns), name
        alternation.step()
    assert "B did not change" not in caplog.text


def test_warm_up_updates_only_the_feedback():
    model = network("aa", amp=0.05, sparse=0.05)
    parameters = list(pyfeedback.forward_parameters(model))
    parameters[-1].requires_grad_(False)
    before = [p.detach().clone() for p in parameters]
    task = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    rule = pyfeedback.optim.FeedbackSGD(model, lr=0.05)
    angles = []
    with alignment_only(model):
        for step in range(40):
            backward(model, step)
            task.step(), rule.step()
            angles.append(pyfeedback.alignment(model)["0"].angle)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert angles[-1] < 0.8 * angles[0]
    assert [p.requires_grad for p in parameters] == [True] * (len(parameters) - 1) + [False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_schedule_does_not_recompile_at_every_step(compiler):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, eager = network("ia", reduction="mean"), network("ia", reduction="mean")
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    running = [
        Schedule(m, amp=schedules.linear(1.0, 0.2, 20), null=schedules.cyclic(0.5, 1.5, 7)) for m in (model, eager)
    ]
    counts = []
    for _ in range(8):
        x = torch.randn(4, 2, 6, 6)
        for run, owner in ((compiled, model), (eager, eager)):
            owner.zero_grad()
            run(x).square().sum().backward()
        pairs = zip(model.parameters(), eager.parameters(), strict=True)
        assert max(largest_error([a.grad], [b.grad]) for a, b in pairs) < 1e-5
        counts.append(counter.frame_count)
        for schedule in running:
            schedule.step()
    assert counts[-1] == counts[0] == 1


def test_growth_control_sets_the_spread_of_what_noise_excites():
    """The variance of B' u over the units, averaged over u uniform in [0, 1), has a closed form."""
    torch.manual_seed(0)
    model = network("wm").double()
    control = GrowthControl(model, std=0.5)
    with torch.no_grad():
        for b in pyfeedback.feedback_parameters(model):
            b.mul_(30)
    control.step()
    for b in pyfeedback.feedback_parameters(model):
        made = torch.rand(20000, b.shape[0], dtype=torch.float64) @ b.detach().flatten(1)
        assert float(made.var(1, correction=0).mean().sqrt()) == pytest.approx(0.5, rel=0.02)
