#!/usr/bin/env bash
# Runs everything that needs a GPU on a machine that has one. Needs no network.
#
#   scripts/gpu_check.sh [STAGE...]
#
# Stages; without arguments all run in this order, with only the first of the benchmarks:
#   device            describe the machine
#   build             compile FlashInfer's modules in one run of ninja
#   kernels           compare each kernel with float64
#   checkpoints       compare bfloat16 checkpoints with transformers
#   host              the host time of a step
#   bench-Qwen3-0.6B  throughput against the roofline and transformers; also bench-Qwen3-8B, -14B
#
# Wheels in .whl/ are installed into build/gpu_site first. Python is $PYTHON (python3), with its own
# torch. All stages together get $BUDGET_S seconds (570); each may use what is left. Pages for
# benchmark/results/ and the logs go to $OUT (build/gpu_check). The exit status is 0 if all is well.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
BUDGET_S=${BUDGET_S:-570}
SITE=$PWD/build/gpu_site
DAY=$(date +%F)
export PYTHONPATH="$SITE:$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$PWD/build/flashinfer}
PATH="$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH"

device() {
    "$PYTHON" --version
    nvidia-smi || true
    nvcc --version || true
    c++ --version || true
    "$PYTHON" - <<'PYTHON_END'
import sys
import torch

print(torch.__version__, "CUDA", torch.version.cuda)
if not torch.cuda.is_available():
    sys.exit("torch finds no GPU")
properties = torch.cuda.get_device_properties(0)
print(properties.name, f"{properties.total_memory / 2**30:.2f} GiB, SM {properties.major}.{properties.minor}")
PYTHON_END
}

# The options in pyproject.toml assume that all test packages are installed.
run_tests() { "$PYTHON" -m pytest -o addopts=--import-mode=importlib -q -rfE -m gpu "$@"; }

run_stage() {
    case $1 in
        device) device ;;
        build) "$PYTHON" scripts/build_flashinfer.py ;;
        kernels) run_tests tests/gpu/test_gpu_kernels.py ;;
        checkpoints) run_tests tests/gpu/test_gpu_checkpoints.py ;;
        host) "$PYTHON" benchmark/micro/host_step.py --results "$OUT/host_step_$DAY.md" ;;
        bench-*)
            "$PYTHON" benchmark/offline_throughput.py --device cuda --models "${1#bench-}" \
                --results "$OUT/offline_${1#bench-}_$DAY.md"
            ;;
    esac
}

install_wheels() {
    if compgen -G '.whl/*.whl' > /dev/null && [ ! -e "$SITE/.done" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" .whl/*.whl &&
            touch "$SITE/.done"
    fi
}

if [ "${GPU_CHECK_STAGE:-}" ]; then  # the script calls itself so that `timeout` limits a stage
    run_stage "$GPU_CHECK_STAGE"
    exit
fi

[ $# -gt 0 ] || set -- device build kernels checkpoints host bench-Qwen3-0.6B
for stage; do
    case $stage in
        device | build | kernels | checkpoints | host) ;;
        bench-*) [ -d "benchmark/models/${stage#bench-}" ] || unknown=$stage ;;
        *) unknown=$stage ;;
    esac
done
if [ "${unknown:-}" ]; then
    echo "gpu_check: there is no stage $unknown; see the head of $0" >&2
    exit 2
fi

mkdir -p "$OUT"
install_wheels || { echo "gpu_check: the wheels in .whl/ cannot be installed" >&2; exit 1; }
page="$OUT/gpu_check_$DAY.md"
printf '| stage | result | seconds | last line |\n|---|---|---|---|\n' > "$page"
status=0
for stage; do
    left=$((BUDGET_S - SECONDS)) began=$SECONDS log="$OUT/$stage.log" result=ok
    if [ "$left" -lt 1 ]; then
        result='no time left' && : > "$log"
    else
        GPU_CHECK_STAGE=$stage timeout --kill-after 10 "$left" "$0" > "$log" 2>&1
        code=$?
        [ $code -eq 0 ] || result="failed ($code)"
        [ $code -ne 124 ] || result='cut off'
    fi
    last=$(tail -n 1 "$log" | tr '|' ' ' | cut -c 1-100)
    [[ $last =~ ^[0-9]+\ skipped ]] && result=skipped
    [ "$result" = ok ] || status=1
    echo "| $stage | $result | $((SECONDS - began)) | $last |" >> "$page"
done
cat "$page"
exit $status
