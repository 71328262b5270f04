"""What importing the package costs."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
before = set(sys.modules)
import pyfeedback
added = set(sys.modules) - before
print(*sorted(name for name in added if not name.startswith("pyfeedback")))
"""


def test_importing_the_package_imports_little_beside_it():
    """torch._dynamo and what it imports take longer than torch itself; triton is imported by the first layer."""
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout.split()
    assert not {name for name in found if name.split(".")[0] in ("sympy", "triton")}
    assert not {name for name in found if name.startswith(("torch._dynamo", "torch._inductor"))}
    assert len(found) < 60
