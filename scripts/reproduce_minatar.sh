#!/usr/bin/env bash
# The five MinAtar games: hard sharing compared with independent networks of the same total parameters and of the same width.
# Usage: scripts/reproduce_minatar.sh [FOLDER]      (nine runs of about 20 minutes on one CPU core each; repeat the command to resume)
# To run seeds in parallel in one folder: SEEDS=0 scripts/reproduce_minatar.sh, SEEDS=1 scripts/reproduce_minatar.sh, ...
set -euo pipefail
folder=${1:-runs/reproduce_minatar}
# 2 replayed samples per step instead of 8, so that a run takes minutes. Updates are few, so the target network is a moving average.
common="env=minatar_pack agent.samples_per_step=2 agent.batch_size=32 agent.target_period=0 compile=false threads=1"
budget=139098 # parameters of hard sharing at its default width
for seed in ${SEEDS:-0 1 2}; do
  mtrl train $common network/sharing=hard seed=$seed run_dir="$folder/hard/s$seed" --or-resume
  mtrl train $common network/sharing=independent network.parameters=$budget seed=$seed run_dir="$folder/independent_equal_parameters/s$seed" --or-resume
  mtrl train $common network/sharing=independent seed=$seed run_dir="$folder/independent_equal_width/s$seed" --or-resume
done
python "$(dirname "$0")/results_table.py" --groups "$folder"/hard "$folder"/independent_equal_parameters "$folder"/independent_equal_width
