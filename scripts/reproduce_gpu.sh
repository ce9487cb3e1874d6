#!/usr/bin/env bash
# For a machine with a GPU and 16 cores: speed of pqn and dqn on eight Atari games, share of the limit, and 25 minutes of training with
# pqn. The last table has the evaluations of this training.
# Usage: scripts/reproduce_gpu.sh [FOLDER]
set -euo pipefail
folder=${1:-runs/reproduce_gpu}
mkdir -p "$folder"
mtrl info | tee "$folder/machine.txt"
python -m pytest -q -m gpu tests
for agent in pqn dqn; do # targets: 28,000 and 20,000 steps per second, and 0.9 of the limit
  mtrl bench env=atari_pack agent=$agent env.num_envs=16 device=cuda --json --seconds=60 | tee "$folder/bench_$agent.json"
done
python "$(dirname "$0")/bench_limit.py" --device cuda | tee "$folder/limit.txt"
# At 28,000 steps per second, 25 minutes are 42M steps, 5.25M per game.
timeout --signal=INT 1600 mtrl train env=atari_pack agent=pqn env.num_envs=16 device=cuda steps_per_task=5000000 \
  checkpoint.every=1000000 eval.every=1000000 eval.episodes=10 run_dir="$folder/pqn" --or-resume || true # stopped after the time limit, with a checkpoint
python "$(dirname "$0")/results_table.py" --curve "$folder/pqn"
