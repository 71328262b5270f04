"""Layers that convert leaves: errors, the strict mode and what is logged."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

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


class ListOfWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(2, 2))])

    def forward(self, x):
        for weight in self.layers:
            x = x @ weight
        return x


@pytest.mark.parametrize(
    ("left", "why"),
    [
        (lambda: nn.LazyLinear(2), "LazyLinear has weights, but they have no shape yet: run a forward pass before the"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "it is parametrized: apply weight_norm and other"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "Linear has weights, but their dtype is torch.complex64, exp"),
        (lambda: ListOfWeights().layers, "ParameterList has weights, but convert does not follow the module that"),
    ],
    ids=["lazy", "parametrized", "complex", "list"],
)
def test_the_reason_why_a_layer_is_left(left, why):
    """Also in the status, where such a layer is one row."""
    model, report = pyfeedback.convert(nn.Sequential(left(), nn.Linear(2, 2)), "ia", return_report=True)
    assert report.changed == ["1"]
    assert list(report.left) == ["0"]
    assert report.left["0"].startswith(why)
    assert len(pyfeedback.status(model)) == 2


def test_a_complex_weight_of_a_forward_is_left():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.last = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)), nn.Linear(3, 2)

        def forward(self, x):
            return self.last((x.to(torch.complex64) @ self.mix).abs())

    model, report = pyfeedback.convert(Mixed(), "fa", return_report=True)
    assert report.changed == ["last"]
    assert "torch.complex64" in report.left[""]
    model(torch.randn(4, 3)).sum().backward()


class OneProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(3, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return nn.functional.linear(self.first(x), self.weight)


def test_a_graph_module_is_converted_as_its_source_says():
    model, report = pyfeedback.convert(torch.fx.symbolic_trace(OneProduct()), "fa", return_report=True)
    assert (sorted(report.changed), report.left) == (["", "first"], {})
    model(torch.randn(4, 3)).sum().backward()


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_a_module_of_torchscript_is_left():
    model, report = pyfeedback.convert(
        nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.Linear(2, 2)), "fa", return_report=True
    )
    assert (report.changed, list(report.left)) == (["1"], ["0"])
    assert [row.path for row in pyfeedback.status(model)] == ["weight", "not called"]


def test_the_report_names_a_model_that_is_one_layer():
    assert str(pyfeedback.convert(nn.Linear(2, 2), "fa", return_report=True)[1]) == "1 layers follow fa(): the model"


def test_a_parametrization_after_the_conversion_is_no_row_of_the_status():
    model = pyfeedback.convert(nn.Sequential(nn.Linear(2, 2)), "ia")
    parametrizations.weight_norm(model[0])
    assert [row.name for row in pyfeedback.status(model)] == ["0"]


class Failing(torch.optim.SGD):
    """An optimizer without a learning rate."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        del self.param_groups[0]["lr"]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("fails", ["init", "optimizer"])
def test_a_conversion_that_fails_half_way_changes_nothing(fails, converted):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Flatten(), nn.LSTM(8, 3), nn.Linear(3, 2))
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    if converted:
        pyfeedback.convert(model, {"0": "kp", "*": "dfa"})
    state, classes = {**model.state_dict()}, [type(m) for m in model.modules()]
    hooks = len(model._forward_hooks)
    if fails == "init":
        with pytest.raises(ValueError, match="Only tensors with 3, 4, or 5 dimensions"):
            pyfeedback.convert(model, "ia", init=nn.init.dirac_)
    else:
        with pytest.raises(ValueError, match="lr is None and Failing has no lr"):
            pyfeedback.convert(model, "ia", optimizer=Failing(model.parameters()))
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model._forward_hooks) == hooks
    handle.remove()
    model[0](torch.randn(1, 2, 2, 2))
    assert not calls
