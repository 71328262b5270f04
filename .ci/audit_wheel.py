"""Check that a wheel supports every Python from 3.10 and every torch from 2.10: `audit_wheel.py WHEEL`.

Requires torch-abi-audit and abi3audit.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = "2.10.0"


def main(wheel: Path) -> None:
    if "-cp310-abi3-" not in wheel.name:
        sys.exit(f"{wheel.name} is not tagged cp310-abi3")
    tools = Path(sys.executable).parent
    subprocess.run([tools / "abi3audit", "--strict", "--verbose", wheel], check=True)
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        top = {path.name for path in Path(folder).iterdir() if not path.name.endswith(".dist-info")}
        if top != {"pyfeedback"}:
            sys.exit(f"{wheel.name} installs {sorted(top)}, expected pyfeedback alone")
        for library in sorted(Path(folder, "pyfeedback").glob("*.so")):
            audit_library(tools, library)


def audit_library(tools: Path, library: Path) -> None:
    """Check that a library uses only the stable ABI of torch 2.10 and links both torch libraries."""
    command = [tools / "torch-abi-audit", "--json", "--check", "torch", library]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    (entry,) = report["bundled_libs"] + report["extensions"]
    torch = entry["torch"]
    if not torch["stable"] or torch["min_torch_version"] != TORCH or torch["unknown_shim_symbols"]:
        sys.exit(f"{library.name} does not use only the stable ABI of torch {TORCH}: {json.dumps(torch)}")
    dynamic = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    for needed in ("libtorch.so", "libtorch_cpu.so"):
        if f"[{needed}]" not in dynamic:
            sys.exit(f"{library.name} is not linked to {needed}")
    print(f"{library.name}: stable ABI of torch {TORCH}, {torch['stable_shim_count']} symbols")


main(Path(sys.argv[1]))
