#!/usr/bin/env bash
# What local linear attention is said to be good at, and what it should not help with: associative recall and state tracking, against
# softmax, RAT and a Titans memory. Trains two layers of one mixer on each task, eight trainings on one thread each, and evaluates them;
# on two cores about ten minutes for each task.
#
#   benchmarks/local_linear_tasks.sh [folder for the results]
#
# FARSPAN names the program, WORKERS the trainings at a time, one thread each. Runs are kept in runs/tasks-*: killed, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export FARSPAN=${FARSPAN:-.venv/bin/farspan} OMP_NUM_THREADS=1
results=${1:-benchmarks/results/cpu-$(date +%Y-%m-%d)/local-linear-tasks}

declare -A mixers=(
    [softmax]="softmax"
    [local_linear]="{mixer: local_linear}"
    [rat]="{mixer: rat, chunk: 4}"
    [titans]="{mixer: titans, variant: memory, decay_to: zero, depth: 2, expansion: 1, refresh: 8}"
)
declare -A tasks=(
    [recall]="batch.tokens=4096 batch.sequence_length=32 data.task.vocab_size=64 data.task.items=8 train.steps=750"
    [swaps]="batch.tokens=2048 batch.sequence_length=8 data.task.vocab_size=16 data.task.items=3 train.steps=1200"
)
names=(local_linear titans rat softmax) # the longest training first
for task in recall swaps; do
    jobs=()
    for name in "${names[@]}"; do
        jobs+=("tasks-$task-$name" "model.mixer_pattern=[${mixers[$name]}]" "data.task.name=$task train.validate_every=150 ${tasks[$task]}")
    done
    printf '%s\0' "${jobs[@]}" | xargs -0 -n 3 -P "${WORKERS:-2}" sh -c '"$FARSPAN" train recipes/eval/recall_tiny.yaml --resume \
        --name "$0" "$1" "description=$0 of the comparison with local linear attention" $2'
    "$FARSPAN" eval recall "${names[@]/#/runs/tasks-$task-}" --multiples 1,2,4 --output "$results/$task"
done
