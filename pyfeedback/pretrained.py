"""Feedback weights in checkpoints that a plain model is made from, as by ``from_pretrained`` of transformers."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfeedback.core.values import check_flag, check_model, describe
from pyfeedback.nn import FeedbackLayer

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NAMES = ("feedback", "mixing", "direct_feedback_seed")  # of tensors in a state dict that belong to the feedback

_log = logging.getLogger("pyfeedback")


def record_rules(model: nn.Module) -> None:
    """Write the names of the rules into the configs of models of transformers, which ``save_pretrained`` saves.

    ``config.feedback_rules`` is the rule by the name of the layer, or ``{"*": rule}`` if all follow the same one.
    """
    for module in reversed(list(model.modules())):  # the whole model last, whose config its parts may share
        if not _is_pretrained(module):
            continue
        config: Any = module.config
        rules = {name: layer.rule.name for name, layer in module.named_modules() if isinstance(layer, FeedbackLayer)}
        if rules:
            same = set(rules.values())
            config.feedback_rules = {"*": same.pop()} if len(same) == 1 else rules
        elif hasattr(config, "feedback_rules"):
            del config.feedback_rules


def load_feedback(model: nn.Module, path: str | os.PathLike, *, strict: bool = True) -> nn.Module:
    """Load only the feedback weights of ``model``, in place, from a checkpoint of a converted model.

    ``save_pretrained`` of transformers writes the feedback weights together with the others, but ``from_pretrained``
    makes a plain model, and drops them. This line keeps them::

        model = pyfeedback.load_feedback(pyfeedback.convert(Model.from_pretrained(path), "ia"), path)

    Args:
        model: a model that :func:`pyfeedback.convert` has converted by the rule of the checkpoint.
        path: a folder with model.safetensors, pytorch_model.bin, or several such files and their index; or one of these
            files, or any other file of a state dict. transformers is not needed, and of files other than .safetensors
            only tensors are read (``weights_only``).
        strict: raise an error if the rules differ, or the feedback weights of ``model`` are not those of the
            checkpoint. Otherwise, those with the same name are loaded, and the differences are logged at WARNING. The
            name of the rule is that in the state dict, or in the config.json that ``save_pretrained`` writes; it is not
            compared if neither has one.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file, or the folder has none of these files.
        ImportError: the package safetensors, which reads .safetensors, is not installed.
        ValueError, TypeError: an argument is invalid, the file is damaged, a feedback weight has another shape, or see
            ``strict``; the model has not been changed.
    """
    check_model(model)
    check_flag("strict", strict)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {describe(path)}, expected a file or folder")
    own = _feedback_tensors(model)
    if not own:
        raise ValueError(f"model is {describe(model)} without feedback weights, expected a model that was converted")
    saved, rules = _read(Path(path))
    keys = {key for _, aliases in own for key in aliases} | model.state_dict().keys()
    found = [(tensor, key) for tensor, aliases in own for key in aliases if key in saved]
    missing = [aliases[0] for _, aliases in own if not any(key in saved for key in aliases)]
    others = [key for key in saved if key not in keys]
    what = f"path is {path}, which has"
    for tensor, key in found:
        if tensor.shape != saved[key].shape:
            raise ValueError(f"{what} {key} of shape {tuple(saved[key].shape)}, expected {tuple(tensor.shape)}")
        if tensor.is_meta:
            raise ValueError(f"{key} of model is on the meta device, expected one with memory: model.to_empty(...)")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FeedbackLayer)}
    problems = []
    if missing:
        problems.append(f"{what} no {_listed(missing)}, expected a checkpoint of this model after its conversion")
    if others:
        problems.append(f"{what} {_listed(others)}, but the model does not")
    for name, layer in layers.items():
        rule = rules.get(name, rules.get("*", layer.rule.name))
        if rule != layer.rule.name:
            problems.append(f"{what} feedback weights of {rule}, but {name or 'the model'} follows {layer.rule.name}")
            break
    if problems and (strict or not found):
        raise ValueError(f"{problems[0]}{'; strict=False loads what is there' if found else ''}")
    for problem in problems:
        _log.warning("%s", problem)
    with torch.no_grad():
        for tensor, key in found:
            tensor.copy_(saved[key])
    for layer in layers.values():
        layer._remember_version()
    return model


def _feedback_tensors(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """The tensors of the feedback, each with its names in checkpoints: several if a layer is shared or renamed."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key in NAMES if isinstance(module, FeedbackLayer) else NAMES[-1:]:
            tensor = getattr(module, key, None)
            if isinstance(tensor, Tensor):
                found.setdefault(id(tensor), (tensor, []))[1].append(f"{name}.{key}" if name else key)
    # save_pretrained of transformers 5 gives some layers the names that they had in older versions.
    renamed = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    if renamed is not None and _is_pretrained(model):
        for key, tensor in renamed(model, {aliases[0]: tensor for tensor, aliases in found.values()}).items():
            if id(tensor) in found:
                found[id(tensor)][1].append(key)
    return list(found.values())


def _is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers."""
    return hasattr(module, "save_pretrained") and hasattr(getattr(module, "config", None), "to_json_string")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the feedback in a checkpoint, by key, and the rules by layer, if they are known."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = [name for name in FILES if (path / name).is_file()]
        if not names:
            raise FileNotFoundError(f"path is {path}, which has none of {', '.join(FILES)}")
        path = path / names[0]
    if not path.is_file():
        raise FileNotFoundError(f"path is {path}, expected a file or folder")
    files = [path]
    if path.suffix == ".json":
        index = json.loads(path.read_text())
        if "weight_map" not in index:
            raise ValueError(f"path is {path}, which has no weight_map, expected an index of files")
        files = [folder / name for name in dict.fromkeys(index["weight_map"].values())]
    saved: dict[str, Tensor] = {}
    rules: dict[str, str] = {}
    for file in files:
        state, metadata = _state_dict(file)
        saved.update(state)
        rules.update((name, of["rule"]) for name, of in metadata.items() if "rule" in of)
    config = folder / "config.json"
    if not rules and config.is_file():
        rules = json.loads(config.read_text()).get("feedback_rules", {})
    return saved, rules


def _state_dict(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the feedback in one file, and the metadata of the state dict."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if _is_feedback(key)}, {}  # noqa: SIM118
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, depending on the bytes
        raise ValueError(f"path is {file}, expected a file that torch.load reads with weights_only=True") from error
    if not isinstance(state, dict):
        raise ValueError(f"path is {file}, which has {describe(state)}, expected a state dict")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and _is_feedback(key)}
    return tensors, getattr(state, "_metadata", {})


def _is_feedback(key: str) -> bool:
    return key.rpartition(".")[2] in NAMES


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
