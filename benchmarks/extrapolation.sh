#!/usr/bin/env bash
# Loss beyond the trained length: trains the variants of recipes/eval/extrapolation_tiny.yaml at 256 tokens, validates them at up to 4096.
# Under fifteen minutes on two CPU cores.
#
#   benchmarks/extrapolation.sh [folder for the results]
#
# FARSPAN names the program, WORKERS the trainings at a time, one thread each. Runs are kept in runs/extrapolation-NAME: killed, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export FARSPAN=${FARSPAN:-.venv/bin/farspan} OMP_NUM_THREADS=1
results=${1:-benchmarks/results/cpu-$(date +%Y-%m-%d)/extrapolation-256}

names=(softmax softmax-log-n lssa lssar-15 rat-window)
patterns=(
    "[softmax]"
    "[{mixer: softplus, phi: exp, power: 0}]" # the control: softmax on cosine scores times log d log N
    "[{mixer: softplus, power: 0}]"
    "[{mixer: softplus, power: 15}]"
    "[{mixer: rat, chunk: 16, rope: none}, {mixer: window, window: 129, rope: null}]" # no positions anywhere
)
"$FARSPAN" data prepare recipes/eval/extrapolation_tiny.yaml
for i in "${!names[@]}"; do printf '%s\0%s\0' "${names[i]}" "${patterns[i]}"; done |
    xargs -0 -n 2 -P "${WORKERS:-2}" sh -c '"$FARSPAN" train recipes/eval/extrapolation_tiny.yaml --resume \
        --name "extrapolation-$0" "model.mixer_pattern=$1" "description=$0 of the extrapolation study"'
"$FARSPAN" eval extrapolation "${names[@]/#/runs/extrapolation-}" --lengths 256,512,1k,2k,4k --segments 16 --output "$results"
