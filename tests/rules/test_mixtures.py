"""Different rules for the layers of one model, by patterns of their names."""

from rule_networks import gradients, network

import pyfeedback


def test_a_mixture_by_name():
    model = network({"0": "ia", "3": pyfeedback.rule("kp", decay=0.0)})
    assert [type(m).__module__.startswith("pyfeedback") for m in (model[0], model[3], model[5])] == [True, True, False]
    assert (model[0].rule.name, model[3].rule.decay) == ("ia", 0.0)
    _, report = pyfeedback.convert(model, {"[03]": "wm", "*": "usf"}, return_report=True)
    assert [model[i].rule.name for i in (0, 3, 5)] == ["wm", "wm", "usf"]
    assert report.changed == ["0", "3", "5"]
    assert str(report).startswith(
        "3 layers follow [03] wm(decay=0.002, amp=0.001, center=True), usf(signs=uniform): 0, 3"
    )


def test_a_mixture_reports_layers_without_a_pattern():
    _, report = pyfeedback.convert(network("bp"), {"0": "ia"}, return_report=True)
    assert report.left == {
        "3": "no pattern of the rules matches its name",
        "5": "no pattern of the rules matches its name",
    }


def test_direct_layers_in_a_mixture():
    model = network({"0": "fa", "*": "dfa"})
    gradients(model)
    ((names, *_),) = model.direct_feedback._drawn
    assert names == (("3", 54), ("5", 7))
