#!/usr/bin/env bash
# The study in docs/report: five structures and independent networks of full width, five seeds each, on the classic pack, with its report.
# Usage, from the project's root: scripts/reproduce_sharing.sh [RUNS_FOLDER]   (STEPS=40000, SEEDS=5, JOBS=1; half an hour on 2 CPU cores)
# Repeat the command to resume. To update the report in docs: cp RUNS_FOLDER/sharing/report/* docs/report/
set -euo pipefail

runs=${1:-runs/reproduce}
mtrl study sharing env=classic_pack network/sharing=independent,hard,film,mmoe,cross_stitch seeds="${SEEDS:-5}" \
  steps_per_task="${STEPS:-40000}" eval.every="$((${STEPS:-40000} / 10))" eval.episodes=10 eval.test_episodes=50 \
  run_dir="$runs/sharing" launcher.jobs="${JOBS:-1}"
