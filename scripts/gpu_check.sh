#!/usr/bin/env bash
# Runs everything that needs a GPU on a machine that has one. Needs no network.
#
#   scripts/gpu_check.sh [STAGE...]
#   scripts/gpu_check.sh --list
#
# Without arguments all stages run, in the order of the table below: the most telling ones first.
# No stage takes longer than the seconds in the table, and all together take at most $BUDGET_S (570).
#
# Results are written as they come, to $OUT (build/gpu_check), so that a run that is cut short
# leaves them: a row per stage in gpu_check_DAY.md, the output of all stages in log.txt, and pages
# for benchmark/results/. The exit status is 0 if all is well.
#
# Wheels in $WHEELS (.whl), which scripts/gpu_packages.py fetches, are installed into build/gpu_site
# first. The compiled modules in .aot/, which scripts/build_flashinfer.py --output makes, are used if
# they suit the GPU. Python is $PYTHON (python3), with its own torch. docs/gpu.md has more.
set -u
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu_check}
BUDGET_S=${BUDGET_S:-570}
WHEELS=${WHEELS:-.whl}
SITE=$PWD/build/gpu_site
DAY=$(date +%F)
export PYTHONPATH="$SITE:$PWD/python:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export FLASHINFER_WORKSPACE_BASE=${FLASHINFER_WORKSPACE_BASE:-$PWD/build/flashinfer}

# A stage, its limit in seconds, and what `python3` runs; `pytest` is short for `-m pytest`.
read -r -d '' STAGES <<'TABLE'
imports          10 scripts/gpu_packages.py check
device           20 scripts/describe_gpu.py
build            60 scripts/build_flashinfer.py --prebuilt .aot --head-dims 128
first-tokens     60 pytest tests/gpu/test_gpu_checkpoints.py -k "qwen3-128-bfloat16 and not off_by_default and not decode_kernel"
bench-Qwen3-0.6B 60 benchmark/offline_throughput.py --device cuda --models Qwen3-0.6B --no-peer --results "$OUT/offline_Qwen3-0.6B_$DAY.md"
attention        60 pytest tests/gpu/test_gpu_attention.py -k "bfloat16-auto-128 and not decode_kernel"
kernels          60 pytest tests/gpu/test_gpu_kernels.py
sampling         60 pytest tests/gpu/test_gpu_sampling_and_experts.py
requests         60 pytest tests/gpu/test_gpu_requests.py
build-others     60 scripts/build_flashinfer.py --prebuilt .aot
attention-others 60 pytest tests/gpu/test_gpu_attention.py -k "not bfloat16-auto-128 and not decode_kernel"
fp8              60 pytest tests/gpu/test_gpu_fp8.py
ranks            60 pytest tests/gpu/test_gpu_ranks.py
bench-Qwen3-14B  60 benchmark/offline_throughput.py --device cuda --models Qwen3-14B --no-peer --results "$OUT/offline_Qwen3-14B_$DAY.md"
checkpoints      60 pytest tests/gpu/test_gpu_checkpoints.py -k "not qwen3-128-bfloat16 and not off_by_default and not decode_kernel"
switches         60 pytest tests/gpu/test_gpu_checkpoints.py -k off_by_default
cuda-core        60 pytest tests/gpu/test_gpu_attention.py tests/gpu/test_gpu_checkpoints.py -k "decode_kernel and cuda_core"
xqa              60 pytest tests/gpu/test_gpu_attention.py tests/gpu/test_gpu_checkpoints.py -k "decode_kernel and xqa"
host             30 benchmark/micro/host_step.py --results "$OUT/host_step_$DAY.md"
bench-Qwen3-8B   60 benchmark/offline_throughput.py --device cuda --models Qwen3-8B --no-peer --results "$OUT/offline_Qwen3-8B_$DAY.md"
peer-Qwen3-0.6B  60 benchmark/offline_throughput.py --device cuda --models Qwen3-0.6B --results "$OUT/peer_Qwen3-0.6B_$DAY.md"
TABLE

row_of() { grep -m 1 "^$1 " <<< "$STAGES"; }

# The options in pyproject.toml assume that all test packages are installed, and that a warning of
# a package is an error.
PYTEST="-m pytest -o addopts=--import-mode=importlib -W default -p no:cacheprovider -v -rfE --maxfail 15 --durations 5 -m gpu"

run_stage() {
    read -r _ _ command <<< "$(row_of "$1")"
    eval "set -- ${command/#pytest/$PYTEST}"
    "$PYTHON" "$@"
}

install_wheels() {
    if compgen -G "$WHEELS/*.whl" > /dev/null && [ ! -e "$SITE/.done" ]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" "$WHEELS"/*.whl &&
            touch "$SITE/.done"
    fi
}

if [ "${GPU_CHECK_STAGE:-}" ]; then  # the script calls itself so that `timeout` limits a stage
    run_stage "$GPU_CHECK_STAGE"
    exit
fi
if [ "${1:-}" = --list ]; then
    echo "$STAGES"
    exit
fi

[ $# -gt 0 ] || set -- $(awk '{ print $1 }' <<< "$STAGES")
for stage; do
    if ! row_of "$stage" > /dev/null; then
        echo "gpu_check: there is no stage $stage; see $0 --list" >&2
        exit 2
    fi
done

mkdir -p "$OUT"
page="$OUT/gpu_check_$DAY.md" log="$OUT/log.txt" status=0
# If it fails, the first stage names the packages that are missing.
install_wheels > "$log" 2>&1 || echo "gpu_check: the wheels in $WHEELS cannot be installed" >&2
printf '| stage | result | seconds | last line |\n|---|---|---|---|\n' > "$page"
for stage; do
    left=$((BUDGET_S - SECONDS)) began=$SECONDS result=ok
    read -r _ limit _ <<< "$(row_of "$stage")"
    printf '\n== %s\n' "$stage" >> "$log"
    if [ "$left" -lt 1 ]; then
        result='no time left'
    else
        # An interrupt lets pytest say what has failed so far.
        GPU_CHECK_STAGE=$stage timeout --signal INT --kill-after 5 $((left < limit ? left : limit)) \
            "$0" >> "$log" 2>&1
        code=$?
        [ $code -eq 0 ] || result="failed ($code)"
        [ $code -ne 124 ] && [ $code -ne 137 ] || result='cut off'
    fi
    last=$(tail -n 1 "$log" | tr -d '=' | tr '|' ' ' | sed 's/^ *//; s/ *$//' | cut -c 1-100)
    [[ $last =~ ^[0-9]+\ skipped ]] && result=skipped
    [ "$result" = ok ] || status=1
    echo "| $stage | $result | $((SECONDS - began)) | $last |" >> "$page"
done
cat "$page"
exit $status
