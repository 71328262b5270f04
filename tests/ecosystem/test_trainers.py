"""Callbacks of Lightning and transformers train as a plain loop with an optimizer that is followed.

A test is skipped if its package is missing: pip install '.[test,ecosystem]' && pytest tests/ecosystem/test_trainers.py
"""

import pytest
import torch
from cases import largest_error
from labeled_models import Labeled, in_order, rows_of
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
    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network(rule)

        def training_step(self, batch, index):
            x, target = batch
            return F.cross_entropy(self.network(x), target)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), **OPTIONS)

    return Classifier()


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
def test_an_invalid_interval_is_refused(make):
    with pytest.raises(ValueError, match="every is -1, expected 0 or more"):
        make(every=-1)


# A script of its own optimizer needs one line more


def converted_with(optimizer, model, rule):
    return pyfeedback.convert(model, rule, optimizer=optimizer, init=pyfeedback.Init(seed=0))


def plain_script(rule):
    model = normalized_convnet()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    converted_with(optimizer, model, rule)  # the line
    for x, target in loader():
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("rule", RULES)
def test_one_line_in_a_plain_script(rule):
    found = plain_script(rule)
    before = converted_with(None, normalized_convnet(), rule).state_dict()
    assert found.keys() == before.keys()
    assert not [name for name in found if name.endswith("feedback") and torch.equal(found[name], before[name])]


@pytest.mark.parametrize("rule", RULES)
def test_one_line_in_a_lightning_module(rule, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = normalized_convnet()

        def training_step(self, batch, index):
            x, target = batch
            return F.cross_entropy(self.network(x), target)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), **OPTIONS)
            converted_with(optimizer, self.network, rule)  # the line
            return optimizer

    module = Classifier()
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, loader())  # fmt: skip
    assert_same(module.network.state_dict(), plain_script(rule))


@pytest.mark.parametrize("rule", RULES)
def test_one_line_with_accelerate(rule):
    accelerate = pytest.importorskip("accelerate")
    model = normalized_convnet()
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)
    converted_with(optimizer, model, rule)  # the line
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    for x, target in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(prepared(x), target))
        optimizer.step()
    assert_same(model.state_dict(), plain_script(rule))
