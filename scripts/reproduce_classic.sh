#!/usr/bin/env bash
# One network for CartPole, Acrobot and MountainCar, default configuration, five seeds: the first section of docs/results.md.
# Usage: scripts/reproduce_classic.sh [FOLDER]      (about 3 minutes per seed on one CPU core; repeat the command to resume)
set -euo pipefail
folder=${1:-runs/reproduce_classic}
for seed in 0 1 2 3 4; do
  mtrl train env=classic_pack seed=$seed run_dir="$folder/s$seed" --or-resume
  mtrl eval "$folder/s$seed" eval.episodes=100
done
python "$(dirname "$0")/results_table.py" "$folder"/s*
