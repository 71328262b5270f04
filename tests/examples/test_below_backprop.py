"""The study of structured feedback weights: its projections, its input gradients and a small run."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfeedback

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.usefixtures("example_folder")
FIXED = ("center", "taps", "groups:2", "groups:4", "rank:2", "rank:4")  # those that are not drawn


@pytest.fixture
def study():
    return importlib.import_module("below_backprop")


def kernel(outputs=16, inputs=8):
    return torch.randn(outputs, inputs, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("structure", FIXED)
def test_a_projection_is_the_nearest_kernel_of_the_structure(study, structure):
    weight = kernel()
    found = study.project(weight, structure)
    torch.testing.assert_close(study.project(found, structure), found)
    assert abs((found * (weight - found)).sum()) < 1e-10 * weight.square().sum()
    assert 0 < found.norm() < weight.norm()


def test_the_structures_are_what_they_are_called(study):
    weight = kernel()
    assert study.project(weight, "center").count_nonzero() == 16 * 8
    assert study.project(weight, "groups:4").count_nonzero() == weight.numel() / 4
    assert torch.linalg.matrix_rank(study.project(weight, "rank:4").flatten(1)) == 4
    assert torch.linalg.matrix_rank(study.project(weight, "taps").reshape(-1, 9)) == 1
    kept = study.project(weight, "sample:2").flatten(1).any(1)
    assert kept.sum() == 8
    with pytest.raises(ValueError, match="structure is 'half', expected one of bp, center"):
        study.project(weight, "half")


def test_the_timed_input_gradients_are_those_of_kernels_of_the_structure(study):
    """The map from dy to the input gradient is a transposed convolution whose kernel is its own projection."""
    weight, x = kernel(16, 16), torch.zeros(1, 16, 7, 7, dtype=torch.float64)
    for structure in FIXED:
        dense = torch.zeros_like(weight)
        for k in range(16):
            dy = torch.zeros(1, 16, 7, 7, dtype=torch.float64)
            dy[0, k, 3, 3] = 1
            dense[k] = study.input_gradient(structure, dy, x, weight)()[0, :, 2:5, 2:5]
        torch.testing.assert_close(study.project(dense, structure), dense)
        dy = torch.randn(1, 16, 7, 7, dtype=torch.float64)
        found = study.input_gradient(structure, dy, x, weight)()
        torch.testing.assert_close(found, F.conv_transpose2d(dy, dense, padding=1))


def test_every_feedback_weight_has_the_structure_and_the_norm_of_its_weight(study):
    model = pyfeedback.convert(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 4)), "fa")
    study.set_feedback(model, "groups:2")
    conv, linear = model[0], model[2]
    torch.testing.assert_close(conv.feedback.norm(), conv.weight.norm())
    assert conv.feedback[:4, 4:].abs().sum() == 0
    assert torch.equal(linear.feedback, linear.weight)


def test_a_small_run(study, tmp_path):
    job = study.StructuredJob(
        study.Setting("fa", 0.008), "resnet8", "cluttered", 0, True, 1, 64, 20, structure="rank:4"
    )
    outcome = study.train(job, tmp_path)
    assert len(outcome.accuracy) == 1
    assert 5 < outcome.angle < 85


def test_the_table_and_the_figure_are_those_of_the_finished_runs(study, tmp_path):
    runs = study.StructuredRuns(study.FOLDER / "runs.jsonl")
    rows = study.table(runs, study.json.loads((study.FOLDER / "times.json").read_text()))
    assert study.markdown(rows) in (study.FOLDER.parent / "below-backprop.md").read_text()
    study.draw(rows, tmp_path / "accuracy")
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}
