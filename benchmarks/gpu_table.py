"""The summary of gpu_check.sh: the result of each stage and the measurements.

python benchmarks/gpu_table.py OUTDIR
"""

import json
import sys
from pathlib import Path

import cudnn_rates
import tables


def main(folder: Path) -> int:
    """Print the tables; return 0 if every stage succeeded."""
    ceilings = None
    if (folder / "rates.json").exists():
        found = json.loads((folder / "rates.json").read_text())
        ceilings = found["ceilings"]
        print(f"copy {ceilings['copy_gb_s']:.0f} GB/s, matrix product {ceilings['product_tflop_s']:.1f} TFLOP/s")
        print("\n".join(cudnn_rates.table(found["rates"])), end="\n\n")
    for name in ("layers", "depthwise", "update", "networks"):
        path = folder / f"{name}.json"
        if path.exists():
            records = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"] if b["extra_info"]]
            print("\n".join(tables.report(records, per_layer=name in ("layers", "depthwise"))))
            if name == "layers" and ceilings:
                print("\n".join(tables.floors(records, ceilings["copy_gb_s"], ceilings["product_tflop_s"])))
    stages = [line.split("\t") for line in (folder / "stages.tsv").read_text().splitlines()]
    print(f"{'stage':12}{'result':24}{'seconds':>8}")
    for name, result, seconds in stages:
        print(f"{name:12}{result:24}{seconds:>8}")
    return int(any(result.startswith("FAILED") for _, result, _ in stages))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
