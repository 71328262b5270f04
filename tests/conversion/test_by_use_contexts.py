"""Modules that use weights in their own forward, in the contexts of PyTorch and with the rest of this package."""

import copy
import inspect
import pickle

import layer_cases
import pytest
import torch
import use_cases
from layer_cases import gradients
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from use_cases import SAMPLED as NAMES
from use_cases import Standardized, converted

import pyfeedback

# Compilation


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("rule", ["fa", "ia"])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_without_a_break(name, rule):
    torch._dynamo.reset()
    model, _, x = converted(name, rule)
    expected = gradients(copy.deepcopy(model), x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        found = gradients(model, x, forward=lambda x: compiled(x))
    layer_cases.assert_close(found, expected)
    assert counter.frame_count == 1
    assert all(layer.called for _, layer in pyfeedback.feedback_layers(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_standardized_convolution_compiles_without_a_break():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = pyfeedback.convert(Standardized(4, 6, 3).double(), "kp"), torch.randn(2, 4, 7, dtype=torch.float64)
    expected = gradients(copy.deepcopy(model), x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    layer_cases.assert_close(gradients(model, x, forward=lambda x: compiled(x)), expected)
    var, mean = torch.var_mean(model.weight, dim=(1, 2), keepdim=True)
    torch.testing.assert_close(model.weight_feedback.weight, ((model.weight - mean) * (var + 1e-5).rsqrt()).detach())


# Copies, checkpoints and conversion back


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_equal_and_independent(name):
    model, _, x = converted(name)
    expected = gradients(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        layer_cases.assert_close(gradients(twin, x), expected)
        for layer in twin.modules():
            if isinstance(layer, pyfeedback.nn.FeedbackLayer):
                nn.init.zeros_(layer.feedback)
        assert gradients(twin, x)["input"].norm() == 0
    layer_cases.assert_close(gradients(model, x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_unconvert_and_checkpoints(name, caplog):
    model, plain, x = converted(name)
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert len(caplog.messages) == len(list(pyfeedback.feedback_parameters(model)))
    again = pyfeedback.convert(model, "fa")
    assert again is model
    assert {layer.rule.name for _, layer in pyfeedback.feedback_layers(model)} == {"fa"}
    assert pyfeedback.unconvert(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    layer_cases.assert_same(gradients(model, x), gradients(plain, x))


def test_isinstance_the_name_of_the_class_and_the_arguments_stay():
    model = pyfeedback.convert(use_cases.Padded(), "fa")
    assert isinstance(model, use_cases.Padded)
    assert type(model).__name__ == "Padded"
    assert repr(model).startswith("Padded(")
    assert inspect.signature(model.forward) == inspect.signature(use_cases.Padded().forward)  # read by trainers
    plain = type(model)()  # as a method of a model that makes another one
    assert not any(pyfeedback.feedback_layers(plain))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(pyfeedback.unconvert(plain)(x), plain(x))


# Other contexts


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpoint_gives_equal_gradients(name, reentrant):
    model, _, x = converted(name)
    expected = gradients(model, x)
    layer_cases.assert_same(
        gradients(model, x, forward=lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected
    )


@pytest.mark.parametrize("name", NAMES)
def test_autocast_computes_in_its_dtype(name):
    model, _, x = converted(name, dtype=torch.float32)
    expected = gradients(model, x)

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert y.dtype is torch.bfloat16
        return y.float()

    for key, value in gradients(model, x, forward=forward).items():
        if value is not None:
            assert (value - expected[key]).norm() <= 0.1 * expected[key].norm() + 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_output_is_the_same(name):
    model, plain, x = converted(name)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert all(layer.called for _, layer in pyfeedback.feedback_layers(model))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_still_send_the_error_through_their_feedback(name):
    model, _, x = converted(name, "fa")
    expected = gradients(model, x)["input"]
    for parameter in pyfeedback.forward_parameters(model):
        parameter.requires_grad_(False)
    torch.testing.assert_close(gradients(model, x)["input"], expected)


@pytest.mark.parametrize("name", ["swin", "conv1d", "indexed"])
def test_torch_func(name):
    model, _, x = converted(name)
    expected = gradients(model, x)
    values = {key: p.detach() for key, p in model.named_parameters()}

    def loss(values, x):
        y = functional_call(model, values, (x,))
        return (y * layer_cases.output_gradient(y)).sum()

    of_values, of_input = grad(loss, (0, 1))(values, x)
    layer_cases.assert_close({"input": of_input} | of_values, expected)
    each = vmap(lambda x: functional_call(model, values, (x,)))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(each, torch.stack([model(x), model(2 * x)]))


def test_processes_average_the_gradients(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, _, x = converted("conv1d")
        expected = gradients(model, x)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second pass fails if a parameter got no gradient in the first
            found = gradients(model, x, forward=wrapped)
        layer_cases.assert_close(found, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_is_refused():
    model, _, _ = converted("conv1d")
    with pytest.raises(RuntimeError, match=r"Conv1D uses feedback weights .* expected DistributedDataParallel"):
        model._replicate_for_data_parallel()


# Modules in modules


class Passes(nn.Module):
    """Gives a weight to a function of another module, and calls the layer as well."""

    def __init__(self):
        super().__init__()
        self.inner, self.fc, self.reader = Applies(), nn.Linear(4, 4, bias=False), use_cases.Swin()

    def forward(self, x):
        return self.reader(self.inner(self.fc(x), self.fc.weight.t()))


class Applies(nn.Module):
    def forward(self, x, weight):
        return F.linear(x.tanh(), weight)


def test_a_weight_may_be_passed_on_and_called_as_well():
    torch.manual_seed(0)
    model = pyfeedback.convert(Passes().double(), "fa")
    x, by_hand = (torch.ones(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    model(x).sum().backward()
    layers = dict(pyfeedback.feedback_layers(model))
    h = pyfeedback.reference.linear(by_hand, model.fc.weight, layers["fc"].feedback)[0].tanh()
    h = pyfeedback.reference.linear(h, model.fc.weight.t(), layers["fc"].feedback.t())[0]
    qkv = layers["reader.qkv"]
    pyfeedback.reference.linear(h, qkv.weight, qkv.feedback)[0].sum().backward()
    torch.testing.assert_close(x.grad, by_hand.grad)


class Tables(nn.Module):
    """Weights of several kinds, of which only one is multiplied with data."""

    def __init__(self):
        super().__init__()
        self.position, self.scale = nn.Parameter(torch.randn(1, 4, 4)), nn.Parameter(torch.ones(1, 4))
        self.projection, self.bias_table = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        scores = x @ x.mT + self.bias_table[torch.tensor([0, 1, 2, 0])]
        return (scores.softmax(-1) @ (x + self.position)) * self.scale @ self.projection


def test_tables_and_scales_are_left_with_a_reason():
    model, report = pyfeedback.convert(nn.Sequential(Tables(), nn.LayerNorm((4, 4))), "fa", return_report=True)
    assert report.changed == ["0"]
    assert [name for name, _ in pyfeedback.feedback_layers(model)] == ["0.projection_feedback"]
    reason = "no product of it with the input was found in the forward"
    assert report.left == {
        "0.position": reason, "0.scale": reason, "0.bias_table": reason, "1": f"LayerNorm has weights, but {reason}"
    }  # fmt: skip


class Strange(nn.Module):
    """Products that have no feedback path."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc, self.last = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "tensordot":
            return self.last(torch.tensordot(x, self.fc.weight, 1))
        if self.kind == "padded":
            return F.linear(x, F.pad(self.fc.weight, (0, 0, 0, 2)))
        return x * self.fc.weight


@pytest.mark.parametrize("kind", ["tensordot", "padded", "elementwise"])
def test_a_use_without_a_feedback_path_gives_a_warning(kind, caplog):
    model = pyfeedback.convert(Strange(kind), "fa")
    for _ in range(2):
        model(torch.randn(4, 4, requires_grad=True)).sum().backward()
    (message,) = caplog.messages
    assert "its weight is used by" in message
    assert "no feedback path" in message


def test_other_dtypes_of_a_weight_and_of_its_mask(caplog):
    class Masked(use_cases.Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.rand(self.shape) < 0.5)

        def forward(self, x):
            assert self.weight.to(torch.int8).dtype is torch.int8
            assert self.mask.view_as(self.weight).dtype is torch.bool
            return F.linear(x, self.weight * self.mask.to(self.weight), self.bias)

    torch.manual_seed(0)
    model = pyfeedback.convert(Masked().double(), "fa")
    x = torch.randn(3, use_cases.C, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, model.weight_feedback.feedback.sum(0).expand(3, -1))
    assert not caplog.messages


def test_a_lookup_in_a_tied_weight_gives_no_warning(caplog):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 7, bias=False)

        def forward(self, ids):
            return self.head(F.embedding(ids, self.head.weight).tanh())

    model = pyfeedback.convert(Tied(), "fa")
    model(torch.arange(3)).sum().backward()
    assert not caplog.messages


def test_rows_of_experts_in_groups():
    """As transformers calls torch._grouped_mm: the rows of each expert, some of them without any."""

    class Grouped(use_cases.Experts):
        def forward(self, rows, ends):
            return torch._grouped_mm(rows, self.weight, offs=ends)

    torch.manual_seed(0)
    model = pyfeedback.convert(Grouped().double(), layer_cases.RULES["ia"])
    twin = copy.deepcopy(model)
    rows, ends = torch.randn(7, use_cases.C, dtype=torch.float64), torch.tensor([3, 3, 7], dtype=torch.int32)
    found = gradients(model, rows, forward=lambda x: model(x, ends))
    linear = pyfeedback.nn.Linear(
        use_cases.C, use_cases.K, bias=False, dtype=torch.float64, rule=layer_cases.RULES["ia"]
    )
    for expert, part in ((0, slice(0, 3)), (2, slice(3, 7))):
        linear.weight.data.copy_(twin.weight[expert].t())
        linear.feedback.data.copy_(twin.weight_feedback.feedback[expert].t())
        y = model(rows, ends)
        expected = layer_cases.gradients(linear, rows[part], layer_cases.output_gradient(y)[part])
        torch.testing.assert_close(found["input"][part], expected["input"])
        torch.testing.assert_close(found["weight"][expert].t(), expected["weight"])
        torch.testing.assert_close(found["weight_feedback.feedback"][expert].t(), expected["feedback"])
    assert found["weight"][1].norm() == 0
