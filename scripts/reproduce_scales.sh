#!/usr/bin/env bash
# One network for CartPole, Acrobot and MountainCar, with MountainCar's rewards multiplied by 1000 for the learner: without value scaling,
# with popart, and with return_norm and an hl_gauss head, three seeds each. Reported returns are unscaled.
# Usage: scripts/reproduce_scales.sh [FOLDER]      (4 to 5 minutes per run on one CPU core; repeat the command to resume)
set -euo pipefail
folder=${1:-runs/reproduce_scales}
factor='agent.reward_factors={MountainCar-v0: 1000}'

run() { # seed, name, overrides
  local run_dir="$folder/$2_s$1"
  mtrl train env=classic_pack "$factor" seed="$1" "${@:3}" run_dir="$run_dir" --or-resume
  mtrl eval "$run_dir" eval.episodes=100
}

for seed in 0 1 2; do
  run $seed none agent/value_scale=none network/head=plain
  run $seed popart agent/value_scale=popart network/head=plain
  run $seed return_norm agent/value_scale=return_norm network/head=hl_gauss
done
python "$(dirname "$0")/results_table.py" "$folder"/none_s* "$folder"/popart_s* "$folder"/return_norm_s*
