#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then the benchmarks, in under ten minutes on one H200.
#
#   benchmarks/gpu.sh [folder for the results]
#
# Needs torch, triton, transformers, typer, rich, matplotlib and pytest, not the rest of what farspan depends on.
# PYTHON names the interpreter. Exit status 1 if a test or a benchmark's check failed; what passed is written anyway.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
# The checkout's root must not be on sys.path, where its folder `kernels` would shadow the package of that name.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 TRITON_INTERPRET=0

if ! "$python" -c "import farspan.cli" 2>/dev/null; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . || exit 1
fi
farspan=("$python" -c "import sys; sys.argv[0] = 'farspan'; from farspan.cli import main; main()")
device=$("$python" -c "import torch; print(torch.cuda.get_device_name().split()[-1].lower())") || exit 1
results=${1:-benchmarks/results/$device-$(date +%Y-%m-%d)}
mkdir -p "$results"

failed=()
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log" || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

# Only the files that hold GPU tests: others may import what is not installed here.
mapfile -t tests < <(grep -rl 'mark\.gpu' tests --include='test_*.py')
step tests 180 "$python" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"
step kernels 330 "${farspan[@]}" bench kernels --rounds 3 --output "$results"
step decode 45 "${farspan[@]}" bench decode --output "$results"
step train 45 "${farspan[@]}" bench train --width 1024 --layers 8 --heads 16 --vocabulary 32768 --length 4096 --rows 4 \
    --rounds 5 --output "$results"
if (($("$python" -c 'import torch; print(torch.cuda.device_count())') > 1)); then
    step parallel 120 "${farspan[@]}" bench parallel --output "$results"
fi

echo "results: $results"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
