"""Layers that convert leaves: errors, the strict mode and what is logged."""

import pytest
from torch import nn

import pyfeedback


def test_a_model_without_a_layer_to_convert_is_refused():
    for model, what in (
        (nn.ReLU(), "model is a ReLU without a layer to convert, expected a convolution"),
        (
            nn.Sequential(nn.Bilinear(2, 2, 3)),
            r"expected .* \(0: Bilinear has weights, but no product of it with the input",
        ),
    ):
        with pytest.raises(ValueError, match=what):
            pyfeedback.convert(model, "ia")
        assert pyfeedback.convert(model, "ia", return_report=True)[1].changed == []


def test_patterns_that_match_no_layer(caplog):
    model = nn.Sequential()
    model.layer1, model.classifier = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="rule has the patterns 'clasifier', none of which matches, expected the name of"
    ):
        pyfeedback.convert(model, {"clasifier": "ia"})
    assert type(model.classifier) is nn.Linear
    pyfeedback.convert(model, {"clasifier": "bp", "*": "ia"})
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.message == "the pattern 'clasifier' of rule matches no layer; the model has classifier"
    caplog.clear()
    pyfeedback.convert(model, {"layer1": "bp", "*": "ia"})
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_strict_refuses_to_leave_a_layer():
    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 3))
    with pytest.raises(ValueError, match="strict is True, but these layers are left: 1: Bilinear has weights"):
        pyfeedback.convert(model, "ia", strict=True)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="these layers are left: 1: no pattern of the rules matches its name"):
        pyfeedback.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"0": "ia"}, strict=True)
    pyfeedback.convert(model[:1], "ia", strict=True)


def test_a_conversion_that_leaves_most_weights_is_logged_as_a_warning(caplog):
    for size, level in ((4, "INFO"), (8, "WARNING")):
        model = nn.ModuleDict(
            {"pair": nn.Bilinear(size, size, 2), "linear": nn.Linear(6, 6), "table": nn.Embedding(99, 9)}
        )
        with caplog.at_level("INFO"):
            pyfeedback.convert(model, "ia")
        (record,) = caplog.records
        assert record.levelname == level
        assert "left pair: Bilinear has weights" in record.getMessage()
        caplog.clear()


def test_layers_left_on_purpose_give_no_warning(caplog):
    pyfeedback.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(9, 9)), {"0": "ia"})
    assert caplog.messages == []
