"""Low-rank adapters of frozen linear layers, as LoRA of peft makes them, in models that are converted."""

import copy

import pytest
import torch
import zoo_checks
from cases import gradients
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.testing import by_reference


class LoraLinear(nn.Module):
    """The output of a frozen layer, plus that of two matrices that are trained: the form of peft."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * 2.0


def plain_base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def with_adapters(model):
    torch.manual_seed(1)
    for i in (0, 2, 4):
        model[i] = LoraLinear(model[i]).double()
    return model


def batch():
    torch.manual_seed(2)
    return torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 4


def test_every_feedback_weight_is_used():
    found = zoo_checks.influence(with_adapters(plain_base()).float(), {"input": batch()[0]})
    assert found == {"tried": 3, "dead": {}}
    assert zoo_checks.weights_that_carry_gradients(with_adapters(plain_base()).float(), {"input": batch()[0]}) == []


@pytest.mark.parametrize("rule", ["fa", "ia", "kp"])
def test_gradients_are_the_reference(rule):
    model = pyfeedback.convert(with_adapters(plain_base()), rule)
    twin, (x, target) = copy.deepcopy(model), batch()
    F.cross_entropy(model(x), target).backward()
    with by_reference() as penalties:
        loss = F.cross_entropy(twin(x), target)
    (loss + sum(penalties)).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad.any() for n, p in model.named_parameters() if "lora_A" in n or "0.lora_B" in n)
    torch.testing.assert_close(
        gradients(trained), gradients([p for p in twin.parameters() if p.requires_grad]), rtol=1e-9, atol=1e-14
    )


@pytest.mark.parametrize("rule", ["ia", "kp", "ia-probes"])
@pytest.mark.parametrize("first", ["convert", "adapters"])
def test_adapters_train_through_the_feedback_of_the_frozen_layers(first, rule, caplog):
    model, (x, target) = plain_base(), batch()
    if first == "convert":
        model = with_adapters(pyfeedback.convert(model, rule))
    else:
        model = pyfeedback.convert(with_adapters(model), rule)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapters = [p for name, p in model.named_parameters() if "lora" in name and not name.endswith("feedback")]
    optimizer = torch.optim.AdamW(adapters, lr=0.05, weight_decay=2e-3)
    pyfeedback.optim.follow(optimizer, model)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if rule == "ia-probes":  # B approaches W within these steps; with a random B, the loss may rise first
        assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if "lora" in name} <= moved
    frozen = {f"{i}.base_layer.{name}" for i in (0, 2, 4) for name in ("weight", "bias")}
    assert not moved & frozen
    assert ({f"{i}.base_layer.feedback" for i in (0, 2, 4)} <= moved) == (rule != "kp")  # which follows steps of W
    assert caplog.messages == []
