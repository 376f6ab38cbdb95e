#!/usr/bin/env bash
# Which membership rule? Trains the three rules of routing attention, and windows alone, on recall and on Python source: eight trainings of
# two to four minutes on one thread each (streaming on code up to 13 where other work runs beside it), and evaluates them; the rule that
# leaks the future also through the streaming one.
#
#   benchmarks/routing.sh [folder for the results]
#
# FARSPAN names the program, WORKERS the trainings at a time, one thread each. Runs are kept in runs/routing-*: killed, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
export FARSPAN=${FARSPAN:-.venv/bin/farspan} OMP_NUM_THREADS=1
results=${1:-benchmarks/results/cpu-$(date +%Y-%m-%d)/routing}

names=(window nearest streaming balanced_leaks_future)
jobs=()
for task in recall code; do
    for name in "${names[@]}"; do
        if [ $task = recall ]; then
            settings="clusters: 4, window: 16, local_heads: 1, local_window: 9" width=9
            recipe=recipes/eval/recall_tiny.yaml steps="batch.tokens=2048 train.steps=1500 train.validate_every=500"
        else
            settings="clusters: 8, window: 128, local_heads: 2, local_window: 65" width=65
            recipe=recipes/eval/quality_tiny.yaml steps="train.steps=250 train.validate_every=250 train.checkpoint_every=null evaluation.tokens=131072"
        fi
        pattern="[{mixer: routing, membership: $name, $settings}]"
        [ $name = window ] && pattern="[{mixer: window, window: $width}]"
        jobs+=("$recipe" "routing-$task-$name" "$pattern" "$steps")
    done
done
"$FARSPAN" data prepare recipes/eval/quality_tiny.yaml
printf '%s\0' "${jobs[@]}" | xargs -0 -n 4 -P "${WORKERS:-2}" sh -c '"$FARSPAN" train "$0" --resume \
    --name "$1" "model.mixer_pattern=$2" "description=$1 of the comparison of membership rules" $3'
# Code with carried states is routed by what comes before alone, whatever the membership; in one forward pass, leaky where that is.
for mode in carried window; do
    "$FARSPAN" eval extrapolation "${names[@]/#/runs/routing-code-}" --lengths 512,1k --segments 64 --mode $mode --output "$results/code-$mode"
done
# recall has no states: the same weights with the membership changed in the recipe
leaky=runs/routing-recall-balanced_leaks_future through=runs/routing-recall-balanced_through_streaming
rm -rf "$through" && cp -r "$leaky" "$through"
sed -i 's/balanced_leaks_future/streaming/' "$through/recipe.yaml" "$through/hf/config.json"
"$FARSPAN" eval recall "${names[@]/#/runs/routing-recall-}" "$through" --multiples 1,2,4 --output "$results/recall"
