#!/usr/bin/env bash
# Everything that needs a GPU, by one command on a machine that has one, without network:
#
#   scripts/gpu_check.sh [STAGE...]
#
# Stages, all of them in this order where none is given, but of the benchmarks the first alone:
#   device            what the machine is
#   build             FlashInfer's modules, in one run of ninja
#   kernels           each kernel against float64
#   checkpoints       bfloat16 checkpoints against transformers
#   host              the host's time for a step
#   bench-Qwen3-0.6B  throughput beside the roofline and transformers; so bench-Qwen3-8B, -14B
#
# Wheels in .whl/ are installed into build/gpu_site first. Python is $PYTHON (python3), torch its
# own. All stages together get $BUDGET_S seconds (570); what is left of it bounds each. Pages for
# benchmark/results/ and the logs go to $OUT (build/gpu_check). The status is 0 if all went well.
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

# The options of pyproject.toml are for a machine with all test packages.
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

if [ "${GPU_CHECK_STAGE:-}" ]; then  # the script calls itself, so that `timeout` bounds a stage
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
