"""Callbacks of Lightning and transformers train as a plain loop with an optimizer that is followed.

A test is skipped if its package is missing: pip install '.[test,ecosystem]' && pytest tests/ecosystem/test_trainers.py
"""

import pytest
import torch
from cases import largest_error
from labeled_models import Labeled, in_order, rows_of
from lightning_modules import classifier
from small_networks import classification, normalized_convnet
from torch import nn
from torch.nn import functional as F

import pyfeedback
from pyfeedback.integrations import lightning_callback, transformers_callback

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of other packages

STEPS, BATCH = 4, 4
RULES = ("ia", "kp", "ia-probes")
OPTIONS = {"lr": 0.05, "weight_decay": 2e-3}


def data():
    return classification(1, STEPS * BATCH, 3)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=BATCH)


def network(rule):
    return pyfeedback.convert(normalized_convnet(), rule)


def plain_loop(rule, clip, epochs=1, dtype=None):
    model = network(rule)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    pyfeedback.optim.follow(optimizer, model, lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for x, target in loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert largest_error(list(found.values()), list(expected.values())) < 1e-5


def lightning_module(lightning, rule):
    return classifier(lightning, network(rule), lambda module: torch.optim.AdamW(module.parameters(), **OPTIONS))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("rule", RULES)
def test_lightning(rule, precision, tmp_path):
    lightning = pytest.importorskip("lightning")
    dtype = torch.bfloat16 if precision == "bf16-mixed" else None

    def trainer(epochs):
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, precision=precision, default_root_dir=tmp_path,
            gradient_clip_val=0.1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[lightning_callback(every=2, lr=0.1, momentum=0.9)],
        )  # fmt: skip

    first, module = trainer(1), lightning_module(lightning, rule)
    first.fit(module, loader())
    assert_same(module.network.state_dict(), plain_loop(rule, 0.1, dtype=dtype))
    angles = {f"angle/network.{name}": layer.angle for name, layer in pyfeedback.alignment(module.network).items()}
    assert {name: float(value) for name, value in first.callback_metrics.items()} == pytest.approx(angles)
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = lightning_module(lightning, rule)
    trainer(2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed.network.state_dict(), plain_loop(rule, 0.1, 2, dtype))


def test_lightning_clips_for_an_optimizer_of_the_package(tmp_path):
    """Under mixed precision, Lightning refuses to clip for any optimizer that unscales gradients itself."""
    lightning = pytest.importorskip("lightning")
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 2e-3}

    class Classifier(plain_module(lightning)):
        def configure_optimizers(self):
            return pyfeedback.optim.SGD(pyfeedback.convert(self, "kp", init=SEEDED), **options)

    module = Classifier()
    plain_trainer(lightning, tmp_path, gradient_clip_val=0.1).fit(module, loader())
    twin = Classifier()
    optimizer = twin.configure_optimizers()
    for x, target in loader():
        optimizer.zero_grad()
        F.cross_entropy(twin.network(x), target).backward()
        nn.utils.clip_grad_norm_(pyfeedback.forward_parameters(twin), 0.1)  # B has no gradient of its own under kp
        optimizer.step()
    assert_same(module.network.state_dict(), twin.network.state_dict())
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        plain_trainer(lightning, tmp_path, gradient_clip_val=0.1, precision="bf16-mixed").fit(Classifier(), loader())


@pytest.mark.parametrize("rule", RULES)
def test_transformers(rule, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    rows = rows_of(*data())

    def trainer(epochs):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=epochs * STEPS, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
            save_strategy="steps", save_steps=STEPS, save_only_model=False, disable_tqdm=True, max_grad_norm=0.1,
            logging_steps=2, learning_rate=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"],
            lr_scheduler_type="constant", remove_unused_columns=False,
        )  # fmt: skip
        model = Labeled(network(rule))
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
        callbacks = [transformers_callback(every=2, lr=0.1, momentum=0.9)]
        return in_order(transformers)(
            model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=callbacks
        )

    first = trainer(1)
    first.train()
    assert_same(first.model.model.state_dict(), plain_loop(rule, 0.1))
    angles = {f"angle/model.{name}": layer.angle for name, layer in pyfeedback.alignment(first.model.model).items()}
    (entry,) = [entry for entry in first.state.log_history if entry["step"] == STEPS and "loss" in entry]
    assert {name: value for name, value in entry.items() if name.startswith("angle")} == pytest.approx(angles)
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert_same(resumed.model.model.state_dict(), plain_loop(rule, 0.1, 2))


@pytest.mark.parametrize("make", [lightning_callback, transformers_callback])
def test_invalid_arguments_are_refused(make):
    with pytest.raises(ValueError, match="every is -1, expected 0 or more"):
        make(every=-1)
    with pytest.raises(ValueError, match="rule is 'xy'"):
        make("xy")
    with pytest.raises(ValueError, match=r"init is a pyfeedback\.init\.Init without a rule, expected None"):
        make(init=pyfeedback.Init(seed=0))


# A script needs one line more

SEEDED = pyfeedback.Init(seed=0)


def adamw(model):
    """The optimizer that the Trainer of transformers builds: no decay of biases."""
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    return torch.optim.AdamW([{"params": others}, {"params": biases, "weight_decay": 0.0}], **OPTIONS)


def plain_script(rule, name=None, epochs=1):
    """The trained network, which is a submodule ``name`` of the model that is converted, or that model itself."""
    network = normalized_convnet()
    model = network if name is None else nn.ModuleDict({name: network})
    optimizer = adamw(model)
    pyfeedback.convert(model, rule, optimizer=optimizer, init=SEEDED)  # the line
    for _ in range(epochs):
        for x, target in loader():
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
    return network.state_dict()


@pytest.mark.parametrize("rule", RULES)
def test_one_line_in_a_plain_script(rule):
    found = plain_script(rule)
    before = pyfeedback.convert(normalized_convnet(), rule, init=SEEDED).state_dict()
    assert found.keys() == before.keys()
    assert not [name for name in found if name.endswith("feedback") and torch.equal(found[name], before[name])]


def plain_module(lightning):
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = normalized_convnet()

        def training_step(self, batch, index):
            x, target = batch
            return F.cross_entropy(self.network(x), target)

        def configure_optimizers(self):
            return adamw(self)

    return Classifier


def plain_trainer(lightning, folder, epochs=1, **options):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_one_line_in_a_lightning_module(rule, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(plain_module(lightning)):
        def configure_optimizers(self):
            optimizer = adamw(self)
            pyfeedback.convert(self.network, rule, optimizer=optimizer, init=SEEDED)  # the line
            return optimizer

    module = Classifier()
    plain_trainer(lightning, tmp_path).fit(module, loader())
    assert_same(module.network.state_dict(), plain_script(rule))


@pytest.mark.parametrize("rule", RULES)
def test_one_line_with_a_lightning_trainer(rule, tmp_path):
    lightning = pytest.importorskip("lightning")
    make = plain_module(lightning)

    def trainer(epochs):
        return plain_trainer(lightning, tmp_path, epochs, callbacks=[lightning_callback(rule, init=SEEDED)])  # the line

    module, first = make(), trainer(1)
    first.fit(module, loader())
    assert_same(module.network.state_dict(), plain_script(rule, "network"))
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = make()
    trainer(2).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed.network.state_dict(), plain_script(rule, "network", 2))
    with pytest.raises(ValueError, match=r"rule is fa\(\), but network.0 follows .*, expected the rule of the earlier"):
        plain_trainer(lightning, tmp_path, callbacks=[lightning_callback("fa")]).fit(module, loader())


def trainer_of(transformers, folder, epochs=1, model=None, **options):
    arguments = transformers.TrainingArguments(
        folder, max_steps=epochs * STEPS, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
        save_strategy="steps", save_steps=STEPS, disable_tqdm=True, max_grad_norm=0.0, learning_rate=OPTIONS["lr"],
        weight_decay=OPTIONS["weight_decay"], lr_scheduler_type="constant",
    )  # fmt: skip
    return in_order(transformers)(model, arguments, train_dataset=rows_of(*data()), **options)


def labeled():
    return Labeled(normalized_convnet())


@pytest.mark.parametrize("rule", RULES)
def test_one_line_with_the_trainer_of_transformers(rule, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trainer(epochs, model):
        callbacks = [transformers_callback(rule, init=SEEDED)]  # the line
        return trainer_of(transformers, tmp_path, epochs, model, callbacks=callbacks)

    first = trainer(1, labeled())
    first.train()
    assert_same(first.model.model.state_dict(), plain_script(rule, "model"))
    resumed = trainer(2, labeled())
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert_same(resumed.model.model.state_dict(), plain_script(rule, "model", 2))
    before = [b.clone() for b in pyfeedback.feedback_parameters(first.model)]
    trainer(1, first.model)  # with a model that follows the rule
    assert all(map(torch.equal, before, pyfeedback.feedback_parameters(first.model)))


def test_a_model_that_the_trainer_makes_when_training_begins(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    callbacks = [transformers_callback("ia", init=SEEDED)]
    trainer = trainer_of(transformers, tmp_path, model_init=labeled, callbacks=callbacks)
    trainer.train()
    assert_same(trainer.model.model.state_dict(), plain_script("ia", "model"))
    with pytest.raises(RuntimeError, match="training resumes from a checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))


@pytest.mark.parametrize("rule", RULES)
def test_one_line_with_accelerate(rule):
    accelerate = pytest.importorskip("accelerate")
    model = normalized_convnet()
    optimizer = adamw(model)
    pyfeedback.convert(model, rule, optimizer=optimizer, init=SEEDED)  # the line
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for x, target in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(prepared(x), target))
        optimizer.step()
    assert_same(model.state_dict(), plain_script(rule))
