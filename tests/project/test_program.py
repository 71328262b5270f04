"""The program `python -m pyfeedback`: info and convert-report. Its tune and check are tested in test_tuning.py."""

import json

import pytest
import torch
from torch import nn

import pyfeedback
from pyfeedback import __main__ as program


class Partly(nn.Module):
    """A model with a layer that cannot be converted."""

    def __init__(self):
        super().__init__()
        self.conv, self.pair, self.table = nn.Conv2d(3, 4, 3), nn.Bilinear(2, 2, 2), nn.Embedding(3, 2)


def whole():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_info_has_versions_and_libraries(capsys):
    assert program.main(["info"]) == 0
    lines = {line[:20].strip(): line[20:].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines["torch"] == torch.__version__
    assert lines["cpu"] == ("yes" if pyfeedback.build_info().cpu else "no")
    assert program.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["version"] == pyfeedback.__version__
    assert found["threads"] == torch.get_num_threads()


def test_a_report_of_a_model_that_is_converted_in_part(capsys):
    assert program.main(["convert-report", "--rule", "kp", f"{__name__}:Partly"]) == 1
    printed = capsys.readouterr().out
    assert "1 layers follow kp" in printed
    assert "left pair: Bilinear has weights" in printed
    assert program.main(["convert-report", "--json", f"{__name__}:Partly"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["converted"] == ["conv"]
    assert found["left"].keys() == {"pair", "table"}
    assert found["rule"] == "ia-probes"


def test_the_exit_status_of_a_whole_conversion_is_0(capsys):
    assert program.main(["convert-report", f"{__name__}:whole"]) == 0
    assert "0, 1" in capsys.readouterr().out


def test_a_model_is_found_in_the_current_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_models.py").write_text("from torch import nn\n\n\ndef small():\n    return nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert program.main(["convert-report", "my_models:small"]) == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torch.nn", "'torch.nn' is not of the form module:function"),
        ("no_such_package:x", "No module named 'no_such_package'"),
        ("math:nothing", "module 'math' has no attribute 'nothing'"),
        ("torch.nn:Linear", "'torch.nn:Linear' cannot be called without arguments: missing a required argument"),
        ("torch.nn:functional", "'torch.nn:functional' cannot be called without arguments: <module"),
    ],
)
def test_a_model_that_does_not_exist(model, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["convert-report", model])
    assert f"argument model: {message}" in capsys.readouterr().err


def test_a_device_that_computes_nothing(capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(["tune", "--device", "meta"])
    assert "argument --device: 'meta' computes nothing" in capsys.readouterr().err


def test_a_check_in_json(monkeypatch, capsys):
    monkeypatch.setitem(program.NETWORKS, "resnet20", ())
    monkeypatch.setattr(program, "OPS", {"alignment": lambda dtype, device: program.aligned(dtype, device)})
    assert program.main(["check", "--json", "--dtype", "float32", "--device", "cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["what"] for row in rows} == {"alignment, float32"}
    assert all(row["refused"] is None and row["error"] < 1e-5 for row in rows)
