#!/usr/bin/env bash
# All checks that need a GPU, in less than nine minutes: benchmarks/gpu_check.sh OUTDIR
#
# Requires a CUDA device, nvcc, and python3 (or $PYTHON) with torch, pytest and pytest-benchmark. Downloads nothing. Builds
# the package, runs the GPU tests, checks memory accesses and races of the kernels, and measures. Each stage has a time
# limit, and what users feel comes first. A failed stage is listed in the final table and sets the exit code; the other
# stages still run. OUTDIR receives stages.tsv, log.txt, table.txt, networks.json, tuned/, rates.json, layers.json,
# depthwise.json and update.json. PYFEEDBACK_CACHE=OUTDIR/tuned uses the choices of the stage tune.
#
# STAND_IN=1 runs all stages on a CPU with tiny sizes, which tests this script.
set -uo pipefail

[[ $# -eq 1 ]] || { echo "usage: $0 OUTDIR" >&2; exit 2; }
root="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
mkdir -p "$1" && out="$(cd "$1" && pwd)" || exit 2
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
began=$SECONDS
budget=530

device=cuda
if [[ -n "${STAND_IN:-}" ]]; then
  device=cpu
  marked=(-m "not slow" -k "forms") rates=(--network resnet20 --batch 2 --dtype float32 --rounds 3)
  layers=(--network resnet20 --batch 2 --budget 0.01 --rule ia)
  depthwise=(--network mobilenet_v2 --batch 1 --budget 0.01 --rule fa --against extension)
  networks=(--network resnet20 --quick --rule ia)
  checked=(--network resnet20 --batch 1 --dtype float32) tuned=(--network resnet20 --batch 1 --budget 0.5)
  export PYFEEDBACK_CUDA=0
else
  architecture="$("$python" -c '
import torch
assert torch.cuda.is_available()
print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)" || {
    echo "$0: no CUDA device that torch can use: nothing was checked" >&2
    exit 3
  }
  marked=(-m gpu) rates=(--network resnet50 --batch 128 --dtype bfloat16)
  layers=(--network resnet50 --batch 128 --dtype bfloat16 --budget 0.1 --against plain --against composed
    --against triton --against triton-unfused)
  for rule in fa wm ia aa kp; do layers+=(--rule "$rule"); done
  depthwise=(--network convnext_t --batch 64 --dtype bfloat16 --budget 0.1 --rule fa --rule ia
    --against plain --against composed --against extension)
  networks=(--network resnet18 --network resnet20 --dtype bfloat16 --budget 0.3 --against plain)
  for rule in wm ia aa kp; do networks+=(--rule "$rule"); done
  checked=(--network resnet50 --batch 4 --dtype bfloat16)
  tuned=(--network resnet50 --batch 128 --dtype bfloat16 --rule ia --budget 45)
  export PYFEEDBACK_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architecture}"
fi
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

: > "$out/stages.tsv"
: > "$out/log.txt"

# stage NAME LIMIT COMMAND...: interrupted at the limit, so that partial measurements are written.
stage() {
  local name="$1" limit="$2" status result start=$SECONDS
  shift 2
  local left=$((budget - (SECONDS - began)))
  ((limit < left)) || limit=$left
  printf '\n== %s\n' "$name" | tee -a "$out/log.txt"
  if ((limit < 5)); then
    result="FAILED: no time left"
  else
    (cd "$work" && timeout --signal=INT --kill-after=10 "$limit" "$@") > "$work/$name.log" 2>&1
    status=$?
    case $status in
      0) result="ok" ;;
      5) [[ $name == tests ]] && result="no tests marked gpu" || result="FAILED: exit 5" ;;
      124 | 137) result="FAILED: over $limit s" ;;
      *) result="FAILED: exit $status" ;;
    esac
    if [[ $name == *check ]] && grep -q "Device not supported" "$work/$name.log"; then
      result="device not supported"
    fi
    tail -c 2000000 "$work/$name.log" >> "$out/log.txt"
    tail -n 15 "$work/$name.log"
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - start))" >> "$out/stages.tsv"
}

skip() { printf '%s\t%s\t0\n' "$1" "$2" >> "$out/stages.tsv"; }

measure() {
  local name="$1" limit="$2" file="$3"
  shift 3
  # --time-limit ends a long run before it is interrupted.
  stage "$name" "$limit" "$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider "$root/benchmarks/$file" \
    --benchmark-only --benchmark-quiet --benchmark-json "$out/$name.json" --device "$device" \
    --time-limit $((limit - 15)) "$@"
}

stage build 150 "$python" -m pip install --no-build-isolation --no-deps --no-cache-dir --target "$work/site" "$root"
# The installed package must come before the source tree.
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"

measure networks 60 test_network_steps.py "${networks[@]}"

stage check 60 "$python" -m pyfeedback check --device "$device" "${checked[@]}"
stage tune 80 env PYFEEDBACK_CACHE="$out/tuned" "$python" -m pyfeedback tune --device "$device" "${tuned[@]}"

stage tests 110 "$python" -m pytest -c "$root/pyproject.toml" -p no:cacheprovider -q --maxfail=20 "${marked[@]}" \
  "$root/tests"

stage rates 60 "$python" "$root/benchmarks/cudnn_rates.py" --device "$device" --out "$out/rates.json" \
  --time-limit 45 "${rates[@]}"
measure layers 80 test_layer_steps.py --backward-only "${layers[@]}"
measure depthwise 40 test_layer_steps.py --backward-only "${depthwise[@]}"
measure update 35 test_feedback_step.py --budget 0.1

sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)"
watched=("$python" "$root/benchmarks/gpu_memcheck.py" --device "$device")
for tool in memcheck racecheck initcheck; do
  if [[ $device == cpu ]]; then
    [[ $tool != memcheck ]] || stage memcheck 40 "${watched[@]}"
  elif [[ -n "$sanitizer" ]]; then
    stage $tool 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 9 "${watched[@]}"
  else
    skip $tool "no compute-sanitizer"
  fi
done

printf '\n'
PYTHONPATH="$PYTHONPATH" "$python" "$root/benchmarks/gpu_table.py" "$out" | tee "$out/table.txt"
exit "${PIPESTATUS[0]}"
