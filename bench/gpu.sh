#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: build, tests, sanitizers, times, a table last.
#
#     bash bench/gpu.sh                        all parts, one after the other
#     bash bench/gpu.sh check                  tests
#     bash bench/gpu.sh sanitize               a few steps under compute-sanitizer
#     bash bench/gpu.sh measure                steps, graph replays, bandwidth, meta-training, kernels
#     bash bench/gpu.sh train                  images per second beside AdamW and SGD
#     bash bench/gpu.sh stability              thousands of steps of large models, into runs/stability; about half an
#                                              hour, less by STABILITY="--models preresnet50 --rival-steps 400", say
#
# Each part takes ${BUDGET:-510} seconds, and at most half a minute more to end what it interrupts. ${OUT:-bench/out}
# gets stages.txt, table.txt, logs.txt, results.csv, meta.csv, and metrics and curves of each model, as far as they
# came; a part that ran before leaves its rows there, and `stability` goes on where it stopped. For a machine with a
# GPU, Python 3.11 or later, PyTorch and Triton, and no package registry: nothing is downloaded. Rows name the commit,
# LOPT_COMMIT where git does not know it. A failing stage does not keep the others from running; the exit status tells
# whether all passed.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-bench/out}" && cd "${OUT:-bench/out}" && pwd) || exit 1
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys
if sys.version_info < (3, 11): sys.exit(f"Python {sys.version.split()[0]} puts the working directory before PYTHONPATH: set PYTHON to 3.11 or later")' || exit 1
RESULTS=$OUT/results.csv
STAGES=$OUT/stages.txt
WORK=$(mktemp -d) || exit 1
trap 'rm -rf "$WORK"' EXIT
: >"$STAGES"
export PYTHONUNBUFFERED=1
START=$SECONDS

# stage NAME SECONDS COMMAND...: run with a time limit, add what it prints to logs.txt, note the outcome
stage() {
    local name=$1 limit=$2 begin=$SECONDS status left
    shift 2
    left=$((${BUDGET:-510} - (SECONDS - START)))
    if [ "$left" -lt 10 ]; then
        printf '%-13s left out: no time\n' "$name" | tee -a "$STAGES"
        return 1
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    # SIGINT first: Python then says where it was, pytest which tests have failed, and `lopt train` saves.
    timeout --signal=INT --kill-after=25 "$limit" "$@" >"$WORK/$name.log" 2>&1
    status=$?
    { printf '\n=== %s: %s\n' "$name" "$*" && cat "$WORK/$name.log"; } >>"$OUT/logs.txt"
    case $status in
    0) printf '%-13s passed   %4d s\n' "$name" $((SECONDS - begin)) ;;
    124 | 137) printf '%-13s TIMEOUT  %4d s\n' "$name" $((SECONDS - begin)) ;;
    *) printf '%-13s FAILED   %4d s, exit %d: %s\n' "$name" $((SECONDS - begin)) "$status" "$(tail -n 1 "$WORK/$name.log")" ;;
    esac | tee -a "$STAGES"
    return "$status"
}

# lay_out FOLDER: what an editable install does, in a folder for PYTHONPATH
lay_out() {
    mkdir -p "$1/lopt" && ln -s "$PWD"/lopt/* "$PWD/kernels" "$PWD/bench" "$1/lopt/"
}

build() {
    # shellcheck disable=SC2016
    stage machine 30 bash -c 'nvidia-smi; nvcc --version || /usr/local/cuda/bin/nvcc --version; "$0" -c "
import torch, triton
print(torch.__version__, triton.__version__, torch.cuda.get_device_properties(0))"' "$PYTHON"
    export LOPT_CUDA_ARCHS=${LOPT_CUDA_ARCHS:-native}
    stage build 150 env LOPT_CPP=1 LOPT_CUDA=1 "$PYTHON" setup.py build_ext --inplace || # what a part before left is built
        stage build-parts 100 "$PYTHON" setup.py build_ext --inplace
    lay_out "$WORK/path"
    export PYTHONPATH=$WORK/path${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1
    stage info 30 "$PYTHON" -m lopt info
}

sanitizer() {
    command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer
} 2>/dev/null

# sanitized NAME SECONDS BACKEND OPTION...: a few steps under compute-sanitizer, each tensor in memory of its own
sanitized() {
    local name=$1 limit=$2 backend=$3
    shift 3
    stage "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" "$@" --error-exitcode 3 \
        "$PYTHON" -m lopt.bench.gpu small --backend "$backend"
}

check() {
    local processes=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && processes=(-n "$(nproc)" --maxprocesses 8)
    local tests=("$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -p no:benchmark "${processes[@]}" \
        tests/kernels tests/hrnn tests/train/test_options.py tests/test_cli.py)
    for backend in cuda triton; do # a fault of one would end the process, and with it the other
        stage "small-$backend" 90 "$PYTHON" -m lopt.bench.gpu small --backend "$backend"
    done
    stage tests-cuda 120 "${tests[@]}" -k 'not triton'
    stage tests-triton 240 "${tests[@]}" -k triton
}

sanitize() {
    SANITIZER=$(sanitizer | head -n 1)
    if [ -z "$SANITIZER" ]; then
        printf '%-13s left out: there is no compute-sanitizer\n' sanitizer | tee -a "$STAGES"
        return
    fi
    sanitized memcheck 120 cuda --tool memcheck --report-api-errors no
    # Of races, those in our kernels. What is initialised only a look at all kernels tells.
    sanitized racecheck 90 cuda --tool racecheck --kernel-name kns=hrnn_
    sanitized synccheck 90 cuda --tool synccheck
    sanitized initcheck 90 cuda --tool initcheck
    stage small-triton 90 "$PYTHON" -m lopt.bench.gpu small --backend triton # compiles what the next two take
    sanitized memcheck-tr 90 triton --tool memcheck --report-api-errors no
    local ours=()
    for kernel in prepare advance summarise apply share forward backward add_groups; do
        ours+=(--kernel-name "kne=$kernel")
    done
    sanitized racecheck-tr 90 triton --tool racecheck "${ours[@]}"
}

measure() {
    stage measure 200 "$PYTHON" -m lopt.bench.gpu measure --out "$RESULTS"
    stage meta 90 "$PYTHON" -m lopt bench meta --device cuda --stages backprop refine --rows 64 1024 --rounds 3 --budget 5 \
        --out "$OUT/meta.csv"
    stage kernels 60 "$PYTHON" -m lopt.bench.gpu kernels --cases resnet50
    stage step 90 "$PYTHON" -m lopt bench step 10M --device cuda --no-compile --rounds 5 --budget 3 --out "$RESULTS"
    # The CUDA kernels with half as many parameters per thread: less code and fewer registers against more reads.
    lay_out "$WORK/pack2" && rm -f "$WORK"/pack2/lopt/_C* "$WORK/pack2/lopt/_build.json"
    stage pack2-build 120 env LOPT_CPP=1 LOPT_CUDA=1 CXXFLAGS="${CXXFLAGS:-} -DLOPT_GPU_PACK=2" NVCC_APPEND_FLAGS=-DLOPT_GPU_PACK=2 \
        "$PYTHON" setup.py build_ext --build-temp "$WORK/pack2/temp" --build-lib "$WORK/pack2"
    stage pack4 30 "$PYTHON" -m lopt.bench.gpu pack --cases resnet50 --out "$RESULTS"
    stage pack2 30 env PYTHONPATH="$WORK/pack2" PYTHONSAFEPATH=1 "$PYTHON" -m lopt.bench.gpu pack --cases resnet50 --out "$RESULTS"
    stage tiles 150 "$PYTHON" -m lopt.bench.gpu tiles --cases resnet50 --out "$RESULTS"
    stage sass 90 "$PYTHON" -m lopt.bench.sass
}

train() {
    stage train 400 "$PYTHON" -m lopt bench train --device cuda --out "$RESULTS"
}

stability() {
    # shellcheck disable=SC2086
    stage stability 510 "$PYTHON" -m lopt bench stability --device cuda ${STABILITY:-}
    for folder in runs/stability/*/; do
        for file in metrics.csv curves.png; do
            [ -s "$folder$file" ] && cp "$folder$file" "$OUT/$(basename "$folder")-$file"
        done
    done
}

[ $# -gt 0 ] || set -- check sanitize measure train stability
for part in "$@"; do
    case $part in
    check | sanitize | measure | train | stability) ;;
    *) echo "bench/gpu.sh: no part '$part'; there are check, sanitize, measure, train, stability" >&2 && exit 2 ;;
    esac
done
build
for part in "$@"; do
    "$part"
    START=$SECONDS
done

echo
for name in kernels meta sass stability; do
    [ -s "$WORK/$name.log" ] && tail -n 80 "$WORK/$name.log" && echo
done
grep -h -E '(passed|failed|error|skipped|ran).* in [0-9]' "$WORK"/tests-*.log 2>/dev/null
grep -h '^FAILED' "$WORK"/*.log 2>/dev/null | sort -u | head -n 20
echo
timeout 20 "$PYTHON" -m lopt.bench.gpu summary "$RESULTS" 2>&1 | tee "$OUT/table.txt"
echo
cat "$STAGES"
! grep -q -E 'FAILED|TIMEOUT|left out' "$STAGES"
