"""Feedback weights that are loaded into a converted plain model, as from_pretrained of transformers makes it."""

import json
import logging

import pytest
import torch
from small_networks import normalized_convnet
from torch import nn

import pyfeedback

RULE = "ia"


def network(rule=RULE, seed=0):
    torch.manual_seed(seed)
    return pyfeedback.convert(normalized_convnet(), rule, init=pyfeedback.Init(seed=seed))


def feedback_of(model):
    return {name: layer.feedback.detach().clone() for name, layer in pyfeedback.feedback_layers(model)}


def write_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_file(folder, state):
    torch.save(dict(state), folder / "weights.pt")
    return str(folder / "weights.pt")


def write_safetensors(folder, state):
    save = pytest.importorskip("safetensors.torch").save_file
    save(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder, state, name="pytorch_model", ending="bin", save=torch.save):
    keys = list(state)
    files = [f"{name}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for file, part in zip(files, (keys[::2], keys[1::2]), strict=True):
        save({key: state[key] for key in part}, folder / file)
    index = {"metadata": {}, "weight_map": {key: files[i % 2] for i, key in enumerate(keys)}}
    (folder / f"{name}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_safetensors_shards(folder, state):
    return write_shards(folder, state, "model", "safetensors", pytest.importorskip("safetensors.torch").save_file)


WRITERS = [write_bin, write_file, write_safetensors, write_shards, write_safetensors_shards]


@pytest.mark.parametrize("write", WRITERS)
def test_only_the_feedback_is_loaded(write, tmp_path):
    saved = network(pyfeedback.Rule(expansion=2, tie=1.0, decay=1e-3), seed=1)  # with a fixed factor, mixing
    model = network(pyfeedback.Rule(expansion=2, tie=1.0, decay=1e-3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert pyfeedback.load_feedback(model, write(tmp_path, saved.state_dict())) is model
    for key, value in model.state_dict().items():
        expected = saved.state_dict() if key.endswith(("feedback", "mixing")) else before
        assert torch.equal(value, expected[key]), key
    assert not any(row.stepped for row in pyfeedback.status(model))


def test_a_shared_layer_has_one_of_its_names(tmp_path):
    def shared():
        layer = nn.Linear(4, 4)
        return pyfeedback.convert(nn.ModuleList([layer, layer]), RULE)

    saved, model = shared(), shared()
    state = saved.state_dict()
    del state["0.feedback"]  # save_pretrained writes a tensor once
    pyfeedback.load_feedback(model, write_bin(tmp_path, state))
    assert torch.equal(model[0].feedback, saved[0].feedback)


def test_the_seed_of_direct_feedback_is_loaded(tmp_path):
    saved, model = network("dfa", seed=1), network("dfa")
    pyfeedback.load_feedback(model, write_bin(tmp_path, saved.state_dict()))
    assert model.direct_feedback_seed == saved.direct_feedback_seed == 1


def with_config(folder, rules):
    (folder / "config.json").write_text(json.dumps({"feedback_rules": rules}))
    return write_bin(folder, dict(network().state_dict()))


def write_index(folder, index):
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


REFUSED = {
    "another rule": (
        lambda folder: write_bin(folder, network("kp").state_dict()),
        "feedback weights of kp, but 0 follows ia; strict=False loads what is there",
    ),
    "another rule in the config": (
        lambda folder: with_config(folder, {"0": "ia", "4": "wm", "5": "ia"}),
        "feedback weights of wm, but 4 follows ia; strict=False loads what is there",
    ),
    "fewer": (
        lambda folder: write_bin(folder, network({"0": RULE, "5": RULE}).state_dict()),
        "no 4.feedback, expected a checkpoint of this model after its conversion; strict=False loads what is there",
    ),
    "more": (
        lambda folder: write_bin(folder, {**network().state_dict(), "6.feedback": torch.ones(2)}),
        "6.feedback, but the model does not; strict=False loads what is there",
    ),
    "none": (
        lambda folder: write_bin(folder, normalized_convnet().state_dict()),
        "no 0.feedback, 4.feedback, 5.feedback, expected a checkpoint of this model after its conversion",
    ),
    "another shape": (
        lambda folder: write_bin(folder, {**network().state_dict(), "5.feedback": torch.ones(2)}),
        r"5.feedback of shape \(2,\), expected \(3, 5\)",
    ),
    "no index": (
        lambda folder: write_index(folder, {"files": {}}) / "pytorch_model.bin.index.json",
        "no weight_map, expected an index of files",
    ),
    "no state dict": (lambda folder: write_bin(folder, [1]), "a list, expected a state dict"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_checkpoint_is_refused(case, tmp_path, caplog):
    write, message = REFUSED[case]
    path, model = write(tmp_path), network()
    before = feedback_of(model)
    with pytest.raises(ValueError, match=f"^path is {path}.*, which has {message}$"):
        pyfeedback.load_feedback(model, path)
    assert all(torch.equal(value, before[name]) for name, value in feedback_of(model).items())
    if message.endswith("strict=False loads what is there"):
        with caplog.at_level(logging.WARNING, "pyfeedback"):
            pyfeedback.load_feedback(model, path, strict=False)
        assert message.partition(";")[0] in caplog.text
        found = torch.load(path / "pytorch_model.bin")
        assert all(torch.equal(value, found.get(f"{n}.feedback", before[n])) for n, value in feedback_of(model).items())


def test_invalid_arguments_are_refused(tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"abc")
    for arguments, error, message in (
        ((normalized_convnet(), tmp_path), ValueError, "model is a .*Sequential without feedback weights"),
        ((network(), tmp_path / "x"), FileNotFoundError, "path is .*x, expected a file or folder"),
        ((network(), tmp_path), FileNotFoundError, "path is .*, which has none of model.safetensors, model.safetens"),
        ((network(), tmp_path / "damaged.pt"), ValueError, "path is .*damaged.pt, expected a file that torch.load"),
        ((network(), 3), TypeError, "path is 3, expected a file or folder"),
        ((network().to("meta"), write_file(tmp_path, network().state_dict())), ValueError, "0.feedback .* meta device"),
    ):
        with pytest.raises(error, match=message):
            pyfeedback.load_feedback(*arguments)


# Models of transformers


SMALL = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "num_key_value_heads": 2, "num_local_experts": 4, "image_size": 32, "patch_size": 8, "num_labels": 5,
}  # fmt: skip
# Renamed when they are saved: the layers of ViT, the head of GPTNeoX, and the router of Mixtral.
SAVED = {
    "Llama": "LlamaForCausalLM", "ViT": "ViTForImageClassification", "GPTNeoX": "GPTNeoXForCausalLM",
    "Mixtral": "MixtralForCausalLM",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize("name", SAVED)
def test_a_model_of_transformers_keeps_its_feedback_in_one_line(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, SAVED[name])
    model = pyfeedback.convert(make(getattr(transformers, f"{name}Config")(**SMALL)), RULE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert json.loads((tmp_path / "config.json").read_text())["feedback_rules"] == {"*": RULE}

    loaded = pyfeedback.load_feedback(pyfeedback.convert(make.from_pretrained(tmp_path), RULE), tmp_path)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    again = make.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"which has feedback weights of ia, but .* follows kp"):
        pyfeedback.load_feedback(pyfeedback.convert(again, "kp"), tmp_path)
    assert not hasattr(pyfeedback.unconvert(model).config, "feedback_rules")
