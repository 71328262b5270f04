#!/usr/bin/env bash
# sanitize.sh asan|tsan PYTHON: build the CPU library with a sanitizer, outside the environment, and run the tests of the
# compiled ops with it. Reports are written to .cache/asan or .cache/tsan; any report fails the run.
set -euo pipefail
kind="$1" python="$(realpath -s "$2")"
cd "$(dirname "$0")/../.."
root="$PWD" site="$PWD/.cache/$kind"

case "$kind" in
  asan) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined" runtime="libasan.so" ;;
  tsan) flags="-fsanitize=thread" runtime="libtsan.so" ;;
  *) echo "sanitize.sh: $kind, expected asan or tsan" && exit 2 ;;
esac
compiler="${CXX:-c++}"

# Build from a copy, to keep the objects of the regular build.
source="$root/.cache/$kind-source"
rm -rf "$site" "$source"
mkdir -p "$source"
cp -R csrc kernels pyfeedback setup.py build_backend.py pyproject.toml MANIFEST.in README.md LICENSE "$source"
rm -f "$source"/pyfeedback/*.so
CFLAGS="-g -O1 -fno-omit-frame-pointer $flags" LDFLAGS="$flags" PYFEEDBACK_CUDA=0 PATH="$(dirname "$python"):$PATH" \
  "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$site" "$source"

preload="$("$compiler" -print-file-name="$runtime") $("$compiler" -print-file-name=libstdc++.so)"
if [ "$kind" = tsan ]; then
  cc -g -O1 -fsanitize=thread -shared -fPIC tests/extension/tsan_openmp.c -o "$site/openmp.so" -lpthread
  preload="$preload $site/openmp.so"
fi

# Python itself is not instrumented: preload the runtime, and ignore memory that the interpreter never frees.
export LD_PRELOAD="$preload"
export ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0:log_path=$site/report"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$site/report"
export TSAN_OPTIONS="ignore_noninstrumented_modules=1:log_path=$site/report"
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
cd "$site"
"$python" -c "import pyfeedback; assert pyfeedback.__file__.startswith('$site'), pyfeedback.__file__"
result=0
"$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" -k "not cuda" \
  "$root"/tests/extension/test_{extension*,depthwise}.py \
  "$root"/tests/optim/test_step_{memory,storage,exactness}.py || result=$?
unset LD_PRELOAD
for report in "$site"/report.*; do
  [ -e "$report" ] && cat "$report" && result=1
done
exit "$result"
