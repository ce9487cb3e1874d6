#!/usr/bin/env bash
# The five MinAtar games with one network: hard sharing against independent networks, of as many parameters in all and of the same width.
# Usage: scripts/reproduce_minatar.sh [folder]      (nine runs of about 20 minutes on one CPU core each; interrupted, it goes on where it was)
# Several may work on one folder side by side: SEEDS=0 scripts/reproduce_minatar.sh, SEEDS=1 scripts/reproduce_minatar.sh, ...
set -euo pipefail
folder=${1:-runs/reproduce_minatar}
# 2 replayed samples per step rather than 8, so that a run takes minutes; the target follows as a moving average, as updates are few.
common="env=minatar_pack agent.samples_per_step=2 agent.batch_size=32 agent.target_period=0 compile=false threads=1"
budget=139098 # what hard sharing has at its default width
for seed in ${SEEDS:-0 1 2}; do
  mtrl train $common network/sharing=hard seed=$seed run_dir="$folder/hard/s$seed" --or-resume
  mtrl train $common network/sharing=independent network.parameters=$budget seed=$seed run_dir="$folder/independent_equal_parameters/s$seed" --or-resume
  mtrl train $common network/sharing=independent seed=$seed run_dir="$folder/independent_equal_width/s$seed" --or-resume
done
python "$(dirname "$0")/results_table.py" --groups "$folder"/hard "$folder"/independent_equal_parameters "$folder"/independent_equal_width
