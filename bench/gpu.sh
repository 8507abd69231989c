#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of at most ten minutes: build, tests, sanitizers, times.
#
#     bash bench/gpu.sh            files and results go to ${OUT:-bench/out}, one table is printed last
#
# For a machine with a GPU, PyTorch and Triton, and no package registry: nothing is downloaded. Each stage has a time limit
# and its own log, and a failing one does not keep the others from running; the exit status tells whether all passed.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-bench/out}" && cd "${OUT:-bench/out}" && pwd) || exit 1
PYTHON=${PYTHON:-python3}
RESULTS=$OUT/results.csv
STAGES=$OUT/stages.txt
: >"$STAGES"
rm -f "$RESULTS"
export PYTHONUNBUFFERED=1
START=$SECONDS
BUDGET=${BUDGET:-585} # seconds for all

# stage NAME SECONDS COMMAND...: run with a time limit, log to $OUT/NAME.log, note the outcome
stage() {
    local name=$1 limit=$2 begin=$SECONDS status left
    shift 2
    left=$((BUDGET - (SECONDS - START)))
    if [ "$left" -lt 10 ]; then
        printf '%-12s left out: no time\n' "$name" | tee -a "$STAGES"
        return 1
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    case $status in
    0) printf '%-12s passed   %4d s\n' "$name" $((SECONDS - begin)) ;;
    124 | 137) printf '%-12s TIMEOUT  %4d s\n' "$name" $((SECONDS - begin)) ;;
    *) printf '%-12s FAILED   %4d s, exit %d: %s\n' "$name" $((SECONDS - begin)) "$status" "$(tail -n 1 "$OUT/$name.log")" ;;
    esac | tee -a "$STAGES"
    return "$status"
}

sanitizer() {
    command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer
} 2>/dev/null

# shellcheck disable=SC2016
stage machine 30 bash -c 'nvidia-smi; nvcc --version || /usr/local/cuda/bin/nvcc --version; "$0" -c "
import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_properties(0))"' "$PYTHON"

export LOPT_CUDA_ARCHS=${LOPT_CUDA_ARCHS:-native}
stage build 150 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --quiet -e .
if ! "$PYTHON" -c 'import lopt.kernels, lopt.bench' 2>/dev/null; then
    # Packages that cannot be written to: build in place, and lay out by hand what an editable install does.
    stage build-in 150 "$PYTHON" setup.py build_ext --inplace
    rm -rf "$OUT/path" && mkdir -p "$OUT/path/lopt"
    ln -s "$PWD"/lopt/* "$PWD/kernels" "$PWD/bench" "$OUT/path/lopt/"
    export PYTHONPATH=$OUT/path${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
fi
stage info 30 "$PYTHON" -m lopt info

stage small 90 "$PYTHON" -m lopt.bench.gpu small # compiles what the sanitizers look at
stage measure 150 "$PYTHON" -m lopt.bench.gpu measure --out "$RESULTS"
stage tests 200 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests
stage train 150 "$PYTHON" -m lopt bench train --device cuda --rounds 3 --out "$RESULTS"
SANITIZER=$(sanitizer | head -n 1)
if [ -n "$SANITIZER" ]; then
    stage memcheck 100 "$SANITIZER" --tool memcheck --report-api-errors no --error-exitcode 3 \
        "$PYTHON" -m lopt.bench.gpu small
    for tool in racecheck synccheck initcheck; do
        stage "$tool" 60 "$SANITIZER" --tool "$tool" --error-exitcode 3 "$PYTHON" -m lopt.bench.gpu small --backend cuda
    done
    stage racecheck-tr 60 "$SANITIZER" --tool racecheck --error-exitcode 3 \
        "$PYTHON" -m lopt.bench.gpu small --backend triton
else
    printf '%-12s left out: there is no compute-sanitizer\n' sanitizer | tee -a "$STAGES"
fi
stage kernels 60 "$PYTHON" -m lopt.bench.gpu kernels --cases resnet50
stage tiles 120 "$PYTHON" -m lopt.bench.gpu tiles --cases resnet50 --out "$RESULTS"
# The CUDA kernels with half as many parameters per thread, in a copy: less code and fewer registers against more reads.
rm -rf "$OUT/pack2" && mkdir -p "$OUT/pack2/lopt" && ln -s "$PWD"/lopt/* "$PWD/kernels" "$PWD/bench" "$OUT/pack2/lopt/"
rm -f "$OUT"/pack2/lopt/_C* "$OUT"/pack2/lopt/_build.json
stage pack2-build 120 env CXXFLAGS="${CXXFLAGS:-} -DLOPT_GPU_PACK=2" NVCC_APPEND_FLAGS=-DLOPT_GPU_PACK=2 \
    "$PYTHON" setup.py build_ext --build-temp "$OUT/pack2/temp" --build-lib "$OUT/pack2"
stage pack4 30 "$PYTHON" -m lopt.bench.gpu pack --cases resnet50 --out "$RESULTS"
stage pack2 30 env PYTHONPATH="$OUT/pack2" PYTHONSAFEPATH=1 "$PYTHON" -m lopt.bench.gpu pack --cases resnet50 --out "$RESULTS"
stage pack2-sass 60 env PYTHONPATH="$OUT/pack2" PYTHONSAFEPATH=1 "$PYTHON" -m lopt.bench.sass
stage step 90 "$PYTHON" -m lopt bench step 100k 1M 10M --device cuda --no-compile --rounds 5 --budget 3 --out "$RESULTS"
stage meta 90 "$PYTHON" -m lopt bench meta --device cuda --stages backprop refine --rows 64 1024 --rounds 3 --budget 5 \
    --out "$OUT/meta.csv"
stage sass 90 "$PYTHON" -m lopt.bench.sass

echo
[ -s "$OUT/sass.log" ] && cat "$OUT/sass.log"
echo
[ -s "$OUT/meta.log" ] && cat "$OUT/meta.log"
echo
grep -h -E 'passed|failed|error' "$OUT/tests.log" 2>/dev/null | tail -n 1
grep -h '^FAILED' "$OUT"/*.log 2>/dev/null | sort -u | head -n 20
echo
"$PYTHON" -m lopt.bench.gpu summary "$RESULTS" 2>&1 | tee "$OUT/table.txt"
echo
cat "$STAGES"
! grep -q -E 'FAILED|TIMEOUT|left out' "$STAGES"
