#!/usr/bin/env bash
# Credit strategies on arithmetic: one warm start, then plain GRPO and the three strategies, five seeds each. 20 minutes on two cores.
#
#   benchmarks/rl.sh [folder for the results]
#
# FARSPAN names the program, WORKERS the trainings at a time, one thread each, SEEDS and STRATEGIES what is trained. Runs are kept in
# runs/rl-STRATEGY-SEED: killed, it goes on; what is finished is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export FARSPAN=${FARSPAN:-.venv/bin/farspan} OMP_NUM_THREADS=1
results=${1:-benchmarks/results/cpu-$(date +%Y-%m-%d)/rl-arithmetic}
seeds=${SEEDS:-1 2 3 4 5}
strategies=${STRATEGIES:-uniform local anchor coupled}

demonstrations=corpora/arithmetic.jsonl
[ -s "$demonstrations" ] || "$FARSPAN" rl demonstrations recipes/rl/arithmetic.yaml -o "$demonstrations" --count 20000 --slips 0.2
"$FARSPAN" data prepare recipes/finetune/arithmetic_warm_start.yaml
"$FARSPAN" train recipes/finetune/arithmetic_warm_start.yaml --resume
for seed in $seeds; do for strategy in $strategies; do printf '%s\0%s\0' "$strategy" "$seed"; done; done |
    xargs -0 -n 2 -P "${WORKERS:-2}" sh -c '"$FARSPAN" rl recipes/rl/arithmetic.yaml --resume --name "rl-$0-$1" \
        "credit.strategy=$0" "seed=$1"'
"${FARSPAN%/*}/python" benchmarks/rl.py --output "$results" --strategies $strategies --seeds $seeds
