"""Models and trainers of other packages with converted models. A test is skipped if its package is missing:

pip install '.[test,ecosystem]' && pytest tests/ecosystem/test_ecosystem.py        # nothing is downloaded
"""

import copy

import pytest
import torch
from cases import RULES, gradients, largest_error
from labeled_models import Labeled, in_order, rows_of
from lightning_modules import classifier
from small_networks import classification, normalized_convnet
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.nn.by_use import ByUse
from pyfeedback.testing import by_reference

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages

CLASSES, BATCH = 5, 4


def images(size):
    return lambda: torch.randn(BATCH, 3, size, size)


def tokens():
    return torch.randint(50, (BATCH, 7))


def torchvision_model(name, **options):
    return lambda: getattr(pytest.importorskip("torchvision").models, name)(num_classes=CLASSES, **options)


def alexnet():
    return without_fat(torchvision_model("alexnet")())


def vgg():
    return without_fat(torchvision_model("vgg11")())


def without_fat(model):
    """The model with 16 instead of 4096 units in its two hidden linear layers."""
    linear = [m for m in model.classifier if isinstance(m, nn.Linear)]
    thin = iter([nn.Linear(linear[0].in_features, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)])
    model.classifier = nn.Sequential(*(next(thin) if m in linear else m for m in model.classifier))
    return model


def vision_transformer():
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(32, 8, 2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES)


def timm_model(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=CLASSES, **options)


def mixer():
    timm = pytest.importorskip("timm.models.mlp_mixer")
    return timm.MlpMixer(CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=24)


class Logits(nn.Module):
    """A transformers model as a function from one input to its logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES,
}  # fmt: skip


def huggingface_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)
    return Logits(transformers.ViTForImageClassification(config))


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **SMALL)
    return Logits(transformers.BertForSequenceClassification(config))


MODELS = {
    "torchvision.resnet18": (torchvision_model("resnet18"), images(32)),
    "torchvision.alexnet": (alexnet, images(64)),
    "torchvision.vgg11": (vgg, images(32)),
    "torchvision.mobilenet_v3_small": (torchvision_model("mobilenet_v3_small"), images(32)),
    "torchvision.convnext_tiny": (torchvision_model("convnext_tiny", stochastic_depth_prob=0.0), images(32)),
    "torchvision.vit": (vision_transformer, images(32)),
    "timm.resnet18": (timm_model("resnet18"), images(32)),
    "timm.convnext_atto": (timm_model("convnext_atto"), images(32)),
    "timm.vit": (timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2), images(32)),
    "timm.mixer": (mixer, images(32)),
    "transformers.vit": (huggingface_vit, images(32)),
    "transformers.bert": (bert, tokens),
}
EXPORTED = ("torchvision.resnet18", "timm.vit", "transformers.vit", "transformers.bert")


def build(name, rule, dtype=torch.float32):
    """The converted model without dropout, a batch and labels."""
    make_model, make_input = MODELS[name]
    torch.manual_seed(0)
    model = pyfeedback.convert(make_model().to(dtype), rule)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = make_input()
    return model, x.to(dtype) if x.is_floating_point() else x, torch.arange(BATCH) % CLASSES


# Models


@pytest.mark.parametrize("rule", ["fa", "everything"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_whole_model_are_the_reference(name, rule):
    model, x, target = build(name, pyfeedback.Rule(**RULES[rule]), torch.float64)
    twin = copy.deepcopy(model)
    F.cross_entropy(model(x), target).backward()
    with by_reference() as penalties:
        loss = F.cross_entropy(twin(x), target)
    (loss + sum(penalties)).backward()
    assert len(penalties) >= len(list(pyfeedback.feedback_layers(model))) > 2
    found, expected = (gradients(list(m.parameters())) for m in (model, twin))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)  # a bias before a norm has gradient zero


@pytest.mark.parametrize("rule", ["bp", "fa", "wm", "ia", "sa", "aa", "kp"])
@pytest.mark.parametrize("name", MODELS)
def test_a_few_steps_change_the_parameters_that_the_rule_updates(name, rule):
    model, x, target = build(name, rule)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = pyfeedback.optim.SGD(model, lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    moved = {id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)}
    for _, layer in pyfeedback.feedback_layers(model):
        assert id(layer.weight) in moved
        assert (id(layer.feedback) in moved) == layer.rule.learns


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_is_skipped_silently(name):
    """Every convolution, linear and attention layer has feedback. The report lists all other layers with weights."""
    model, report = pyfeedback.convert(MODELS[name][0](), "fa", return_report=True)
    layers = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    assert report.changed == [n for n, m in model.named_modules() if isinstance(m, layers)]
    weights = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.dim() > 1}
    assert weights == {*report.changed, *report.left}


def swin():
    torchvision = pytest.importorskip("torchvision")
    options = {"patch_size": [2, 2], "window_size": [2, 2], "stochastic_depth_prob": 0.0, "num_classes": CLASSES}
    return torchvision.models.SwinTransformer(embed_dim=8, depths=[2, 1], num_heads=[2, 2], **options)


def gpt2():
    transformers = pytest.importorskip("transformers")
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Logits(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, **dropout))
    )


def mixtral(implementation):
    def make():
        transformers = pytest.importorskip("transformers")
        config = transformers.MixtralConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, experts_implementation=implementation,
        )  # fmt: skip
        return Logits(transformers.MixtralForCausalLM(config))

    return make


# Models whose weights are used without calling a layer, and the modules that use them.
USED = {
    "torchvision.swin": (swin, images(16), "ShiftedWindowAttention"),
    "timm.eva02": (timm_model("eva02_tiny_patch14_224", img_size=28, depth=1), images(28), "EvaAttention"),
    "timm.beit": (timm_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24), images(32), "Attention"),
    "timm.bit": (timm_model("resnetv2_50x1_bit"), images(32), "StdConv2d"),
    "timm.nfnet": (timm_model("nfnet_l0", drop_rate=0.0), images(32), "ScaledStdConv2d"),
    "timm.tf_efficientnet": (timm_model("tf_efficientnet_b0"), images(32), "Conv2dSame"),
    "transformers.gpt2": (gpt2, tokens, "Conv1D"),
    **{
        f"transformers.mixtral {i}": (mixtral(i), tokens, "MixtralExperts")
        for i in ("eager", "batched_mm", "grouped_mm")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", USED)
def test_every_product_has_a_feedback_path(name):
    """With W as B, all gradients are those of backprop; with another B, that of the input differs."""
    make_model, make_input, user = USED[name]
    torch.manual_seed(0)
    dtype = torch.float32 if "grouped_mm" in name else torch.float64
    plain = make_model().to(dtype).eval()
    model = pyfeedback.convert(copy.deepcopy(plain), "fa")
    assert user in {type(m).__name__ for m in model.modules() if isinstance(m, ByUse)}
    x = make_input()
    x = x.to(dtype) if x.is_floating_point() else x
    outputs = []
    for each in (plain, model):
        outputs.append(each(x))
        outputs[-1].square().mean().backward()
    torch.testing.assert_close(*outputs)
    layers = dict(pyfeedback.feedback_layers(model))
    assert all(layer.called for layer in layers.values())
    found, true = ([p.grad for p in pyfeedback.forward_parameters(m) if p.grad is not None] for m in (model, plain))
    assert largest_error(found, true) > 0.1
    model.zero_grad()
    for layer in layers.values():
        layer.feedback.data.copy_(layer.weight)
    model(x).square().mean().backward()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(key).grad, parameter.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_experts_have_the_gradients_of_eager_ones(implementation):
    """transformers calls an op of its own for grouped products under torch.compile, so they are not compiled."""
    torch.manual_seed(0)
    model = pyfeedback.convert(mixtral(implementation)(), "ia")
    twin, x = copy.deepcopy(model), tokens()
    torch.compile(model, backend="aot_eager")(x).square().mean().backward()
    twin(x).square().mean().backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, twin))
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "node"), [("torchvision.resnet18", "layer1"), ("torchvision.swin", "features.1.0")])
def test_the_feature_extractor_of_torchvision_keeps_the_feedback_paths(name, node):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    make_model, make_input, *_ = {**MODELS, **USED}[name]
    model = pyfeedback.convert(make_model(), "fa").eval()
    x, features = make_input().requires_grad_(), []
    with model.get_submodule(node).register_forward_hook(lambda *call: features.append(call[-1])):
        model(x)
    features.append(extraction.create_feature_extractor(model, {node: "found"})(x)["found"])
    torch.testing.assert_close(*features)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in features))


# Export


def unconverted(name):
    model, x, _ = build(name, "ia")
    return pyfeedback.unconvert(model).eval(), x


@pytest.mark.parametrize("name", EXPORTED)
def test_an_unconverted_model_is_exported(name):
    model, x = unconverted(name)
    program = torch.export.export(model, (x,))
    assert not any("pyfeedback" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", EXPORTED)
def test_an_unconverted_model_runs_as_onnx(name, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    model, x = unconverted(name)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    found = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_an_unconverted_transformers_model_is_saved_and_loaded(tmp_path):
    model, x, _ = build("transformers.bert", "kp")
    expected = pyfeedback.unconvert(model).eval()(x)
    model.model.save_pretrained(tmp_path)
    loaded, info = type(model.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(x).logits, expected)


# Trainers: the parameters after training equal those of a plain loop

STEPS = 4
TRAINED = ("ia", "kp", "sa")


def batches():
    return classification(1, STEPS * BATCH, 3)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches()), batch_size=BATCH)


def network(rule):
    return pyfeedback.convert(normalized_convnet(), rule)


def optimizer_of(model):
    return pyfeedback.optim.SGD(model, lr=0.1, momentum=0.9, weight_decay=2e-3)


def plain_loop(rule, dtype=None):
    model = network(rule)
    optimizer = optimizer_of(model)
    for x, target in loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    return model.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert largest_error(list(found.values()), list(expected.values())) < 1e-6


def lightning_module(lightning, rule):
    return classifier(lightning, network(rule), optimizer_of)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("rule", TRAINED)
def test_lightning(rule, precision, tmp_path):
    lightning = pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "precision": precision, "default_root_dir": tmp_path, **quiet}
    module = lightning_module(lightning, rule)
    trainer = lightning.Trainer(max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module, loader())
    assert_same(module.network.state_dict(), plain_loop(rule, torch.bfloat16 if precision == "bf16-mixed" else None))

    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = lightning_module(lightning, rule)
    lightning.Trainer(max_epochs=2, enable_checkpointing=False, **options).fit(
        resumed, loader(), ckpt_path=tmp_path / "last.ckpt"
    )
    whole = lightning_module(lightning, rule)
    lightning.Trainer(max_epochs=2, enable_checkpointing=False, **options).fit(whole, loader())
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("rule", TRAINED)
def test_accelerate(rule, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = network(rule)
    model, optimizer, data = accelerator.prepare(plain, optimizer_of(plain), loader())
    for x, target in data:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), target))
        optimizer.step()
    trained = {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    assert_same(trained, plain_loop(rule))

    accelerator.save_state(tmp_path)
    for parameter in model.parameters():
        parameter.data.zero_()
    accelerator.load_state(tmp_path)
    assert_same(accelerator.unwrap_model(model).state_dict(), trained)


@pytest.mark.parametrize("rule", TRAINED)
def test_the_trainer_of_transformers(rule, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    rows = rows_of(*batches())
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True, save_strategy="no", report_to=[],
        disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant", remove_unused_columns=False,
    )  # fmt: skip
    model = Labeled(network(rule))
    trainer = in_order(transformers)(model, arguments, train_dataset=rows, optimizers=(optimizer_of(model), None))
    trainer.train()
    assert_same(model.model.state_dict(), plain_loop(rule))
