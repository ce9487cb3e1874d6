#!/usr/bin/env bash
# Effect of the fast settings on learning: classic_pack and MinAtar's Breakout and Freeway with the fast settings (compiled, few large
# updates, automatic precision and threads) and with plain ones (eager, float32, 32 samples per task and update as published, one thread);
# three seeds each.
# Usage: scripts/reproduce_speed.sh [FOLDER]      (twelve runs of 3 to 10 minutes; repeat the command to resume)
set -euo pipefail
folder=${1:-runs/reproduce_speed}
minatar='env=minatar_pack env.tasks=[breakout,freeway] steps_per_task=200000 eval.episodes=30'
plain='compile=false precision=fp32 threads=1'
for seed in ${SEEDS:-0 1 2}; do
  mtrl train env=classic_pack eval.episodes=30 compile=true seed=$seed run_dir="$folder/classic_fast/s$seed" --or-resume
  mtrl train env=classic_pack eval.episodes=30 $plain seed=$seed run_dir="$folder/classic_plain/s$seed" --or-resume
  mtrl train $minatar seed=$seed run_dir="$folder/minatar_fast/s$seed" --or-resume
  mtrl train $minatar $plain agent.batch_size=32 agent.target_period=1000 seed=$seed run_dir="$folder/minatar_plain/s$seed" --or-resume
done
python "$(dirname "$0")/results_table.py" --groups "$folder"/classic_fast "$folder"/classic_plain
python "$(dirname "$0")/results_table.py" --groups "$folder"/minatar_fast "$folder"/minatar_plain
