#!/usr/bin/env bash
# One network for Pong and Breakout, about an hour on 2 CPU cores: the last section of docs/results.md.
# Usage: scripts/reproduce_pong_breakout.sh [FOLDER]      (repeat the command to resume)
set -euo pipefail
folder=${1:-runs/reproduce_pong_breakout}
mtrl train experiment=pong_breakout seed=0 run_dir="$folder/s0" --or-resume
mtrl eval "$folder/s0" eval.episodes=30 eval.max_steps=27000
python "$(dirname "$0")/results_table.py" --curve "$folder"/s0
