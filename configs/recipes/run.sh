#!/usr/bin/env bash
# One recipe from the first check to pictures side by side:
#
#     bash run.sh MODEL [OPTIONS]        # MODEL is a folder beside this file: flux_dev, ...
#
# OPTIONS go to every command that draws, after those of call.yaml: `--pipeline FOLDER`,
# `--settings.height 512`, `--dtype float16`. What has been recorded is not recorded again. Of the
# environment: TRAJECTORIES to record, BUDGETS of network evaluations ("11 8"), TAP to forecast,
# COMPARE as many held-out prompts, BENCH as many against METHODS, PYTHON. Everything lands in
# runs/recipes/MODEL.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
model=${1:-}
recipe=$here/$model
if [ -z "$model" ] || [ ! -f "$recipe/call.yaml" ]; then
    echo "found no recipe '$model'; expected one of: $(cd "$here" && echo */)" >&2
    exit 2
fi
shift
out=runs/recipes/$model
tap=${TAP:-output}
pipeline=$(sed -n 's/^pipeline: *//p' "$recipe/call.yaml")
call=(--pipeline "$pipeline" --config "$recipe/call.yaml" "$@")
budgets=${BUDGETS:-11 8}

run() {
    echo "+ $*"
    "$@"
}

# Anchors for so many evaluations: the list that the offline search found best for least squares.
anchors() {
    "${PYTHON:-python}" - "$out" "$1" "$tap" <<'END'
import json
import sys
from pathlib import Path

folder, count, tap = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
rows = json.loads((folder / "inspect" / "offline.json").read_text())["rows"]
wanted = {"method": "l2p_lstsq", "anchors_name": "searched", "tap": tap, "num_anchors": count}
found = [row for row in rows if wanted.items() <= row.items()]
if not found:
    sys.exit(f"{folder}/inspect/offline.json has no list for {wanted}: record more.")
print(json.dumps(found[0]["anchors"]))
END
}

run foreseer inspect "${call[@]}" --prompts "$here/calibration.txt"
run foreseer record --config "$recipe/record.yaml" "${call[@]}" --prompts "$here/calibration.txt" \
    --out "$out/recording" ${TRAJECTORIES:+--num_trajectories "$TRAJECTORIES"}
run foreseer inspect "$out/recording" --out "$out/inspect" --budgets "[${budgets// /, }]"
for budget in $budgets; do
    chosen=$(anchors "$budget")
    run foreseer fit --config "$recipe/fit.yaml" \
        --model.init_args.anchors "$chosen" --model.init_args.tap "$tap" --data.init_args.tap "$tap" \
        --trainer.callbacks.init_args.dirpath "$out/fit_$budget"
    run foreseer export --checkpoint "$out/fit_$budget/last.ckpt" --out "$out/l2p_$budget"
    for number in $(seq "${COMPARE:-2}"); do
        prompt=$(sed -n "${number}p" "$here/held_out.txt")
        run foreseer generate "${call[@]}" --predictor "$out/l2p_$budget" --compare true \
            --prompts "[\"$prompt\"]" --seed $((100000 + number)) \
            --out "$out/compare_${budget}_$number.png"
    done
    learned="${learned:+$learned, }\"l2p=$out/l2p_$budget\""
done
if [ -n "${BENCH:-}" ]; then
    methods=${METHODS:-euler dpmpp_2m unipc reuse taylor_1 taylor_2 hicache_2}
    run foreseer bench "${call[@]}" --prompts "$here/held_out.txt" --num_samples "$BENCH" \
        --batch_size 1 --budgets "[${budgets// /, }]" --methods "[${methods// /, }]" \
        --predictors "[$learned]" --out "$out/bench"
fi
