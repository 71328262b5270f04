"""benchmarks/roofline.py: the floor and the modelled times of layers on a GPU that is not there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

CHECKS = """
import sys
import roofline
import torch
from gpu_layers import NETWORKS, linear
from gpu_model import BATCH, DEVICES, Work, _instructions, backward_works, traced
from kernel_instructions import key, launches
from roofline import floor, rows
import pyfeedback

h100, bp, wm, ia = DEVICES["h100"], *map(pyfeedback.rule, ("bp", "wm", "ia"))

# Each of two products reads two of three tensors and writes the third.
layer = linear((), 512, 256)
moved = 2 * (BATCH * 512 + BATCH * 256 + 512 * 256)
works = backward_works(layer, bp, h100)["composite"]
assert [(work.flops, work.bytes) for work in works] == 2 * [(2 * BATCH * 512 * 256, moved)]
assert floor(layer, bp, h100) == 2 * (2 * BATCH * (512 + 256) - BATCH * 256 + 2 * 512 * 256) / (0.9 * 3350e9)

# Views and allocations are no kernels, and what is only written is not read.
with traced() as works:
    x = torch.zeros(8, 4, device="meta")
    torch.empty_like(x).copy_(x.t().reshape(8, 4)).add_(1)
assert [(w.name, w.bytes) for w in works] == [("zeros", 128), ("clone", 256), ("copy_", 256), ("add_", 256)]

# The longest of three bounds a kernel.
assert Work("a", bytes=3e9).limit(h100) == "bytes"
assert Work("a", flops=1e12, bytes=1e6).limit(h100) == "products"
assert Work("a", bytes=1e6, cycles=1e6).limit(h100) == "instructions"
assert Work("a", flops=1e12, filled=0.5).seconds(h100) > 1.9 * Work("a", flops=1e12).seconds(h100)

# The launches of every layer of ResNet-50 have counted instructions; those of one layer are what the plan says.
assert launches().keys() == _instructions().keys(), "run python benchmarks/kernel_instructions.py"
layer = next(layer for layer in NETWORKS["resnet50"] if layer.name == "64-256-1x1s1@56")
names = [work.name for work in backward_works(layer, ia, h100)["triton"]]
assert names[:2] == ["mean", "pointwise(dx, dW, gram)"], names
assert all(work.cycles > 0 for work in backward_works(layer, ia, h100)["triton"][1:2])
for row in rows("vit_b", ["bp", "wm", "aa"], "h200"):
    assert min(row.modelled.values()) >= row.floor, row

sys.argv = ["roofline.py", "a100", "--network", "vit_b", "--rule", "ia", "--figure", sys.argv[1]]
roofline.main()
"""


def run(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_model_and_the_program(tmp_path):
    out = run("-c", CHECKS, str(tmp_path / "figure"))
    assert "modelled and unmeasured" in out
    assert len(re.findall(r"^  \S+ +x\d+ +ia +[\d.]+", out, re.MULTILINE)) == 6
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


@pytest.mark.long
def test_the_page_has_the_steps_that_the_program_prints():
    printed = run("roofline.py", "h100", "--step")
    page = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^  (\S+) +([\d.]+) +([\d.]+) +([\d.]+) (met|missed)$", printed, re.MULTILINE)
    assert len(rows) == 9
    for row in rows:
        assert f"| {' | '.join(row)} |" in page
