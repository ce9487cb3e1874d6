#!/usr/bin/env bash
# Effect of augmentation at a small budget: one network for MinAtar's Breakout and Space Invaders, which are mirror-symmetric;
# none, shift, flip and both, three seeds each, 100 test episodes per task. Updates as in reproduce_transfer.sh.
# Usage: scripts/reproduce_augmentation.sh [FOLDER]      (twelve runs; repeat the command to resume)
# STEPS: steps per task. SEEDS: list of seeds.
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
