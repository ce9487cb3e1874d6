#!/usr/bin/env bash
# What augmentation does to learning at a small budget: MinAtar's Breakout and Space Invaders, which are the same in a mirror, with one network;
# none, shift, flip and both, three seeds each, 100 test games per task. Updates as in reproduce_transfer.sh.
# Usage: scripts/reproduce_augmentation.sh [folder]      (twelve runs; interrupted, it goes on where it was)
# STEPS: per task. SEEDS: which.
set -euo pipefail
folder=${1:-runs/reproduce_augmentation}
for seed in ${SEEDS:-0 1 2}; do
  for augmentation in none shift flip '[shift,flip]'; do
    name=$(tr -d '[]' <<<"$augmentation" | tr , _)
    mtrl train env=minatar_pack 'env.tasks=[breakout,space_invaders]' "steps_per_task=${STEPS:-150000}" eval.test_episodes=100 \
      agent.samples_per_step=2 agent.batch_size=32 agent.target_period=0 compile=false threads=1 \
      augmentation="$augmentation" seed="$seed" run_dir="$folder/$name/s$seed" --or-resume
  done
done
python "$(dirname "$0")/results_table.py" --groups "$folder"/none "$folder"/shift "$folder"/flip "$folder"/shift_flip
