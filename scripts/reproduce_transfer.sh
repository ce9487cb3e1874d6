#!/usr/bin/env bash
# What a network gains on other tasks by what it has learned, against training on them from scratch: MinAtar, three games as the source and the
# other two as targets; CartPole and Acrobot as the source and MountainCar as the target. Three seeds each, 100 test games per task.
# Usage: scripts/reproduce_transfer.sh [folder]      (interrupted, it goes on where it was; the tables are in folder/*/transfer.md)
# MINATAR_STEPS, CLASSIC_STEPS: steps per task, of sources and targets alike. SEEDS: runs of each kind. PACKS: which of the two.
set -euo pipefail
folder=${1:-runs/reproduce_transfer}

study() { # name, tasks of the source, tasks of the target, overrides of both
  local test=eval.test_episodes=100
  mtrl train "${@:4}" $test "env.tasks=[$2]" run_dir="$folder/$1_source" --or-resume
  mtrl transfer "$folder/$1_source" "${@:4}" $test "env.tasks=[$3]" "seeds=${SEEDS:-3}" run_dir="$folder/$1"
}

for pack in ${PACKS:-classic minatar}; do
  if [ "$pack" = classic ]; then
    study classic CartPole-v1,Acrobot-v1 MountainCar-v0 env=classic_pack "steps_per_task=${CLASSIC_STEPS:-100000}"
  else
    # The targets are the two games that are learned within such a budget, so that there is something to be gained; samples per step and updates
    # as in reproduce_minatar.sh. MINATAR=hard: the other way round, of which Asterix and Seaquest take longer.
    source=asterix,seaquest,space_invaders target=breakout,freeway
    if [ "${MINATAR:-easy}" = hard ]; then source=breakout,freeway,space_invaders target=asterix,seaquest; fi
    study "minatar_${MINATAR:-easy}" "$source" "$target" env=minatar_pack "steps_per_task=${MINATAR_STEPS:-200000}" \
      agent.samples_per_step=2 agent.batch_size=32 agent.target_period=0 compile=false threads=1
  fi
done
