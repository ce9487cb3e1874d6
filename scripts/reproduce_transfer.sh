#!/usr/bin/env bash
# Transfer to other tasks, compared with training from scratch: MinAtar with three source games and the other two as targets; CartPole and
# Acrobot as sources and MountainCar as target. Three seeds each, 100 test episodes per task.
# Usage: scripts/reproduce_transfer.sh [folder]      (repeat the command to resume; the reports are in folder/*/report)
# MINATAR_STEPS, CLASSIC_STEPS: steps per task, for sources and targets. SEEDS: number of seeds. PACKS: classic, minatar.
# JOBS: runs at a time.
set -euo pipefail
folder=${1:-runs/reproduce_transfer}

study() { # name, tasks of the source, tasks of the target, overrides of both
  local test=eval.test_episodes=100
  mtrl train "${@:4}" $test "env.tasks=[$2]" run_dir="$folder/$1_source" --or-resume
  mtrl transfer "$folder/$1_source" "${@:4}" $test "env.tasks=[$3]" "seeds=${SEEDS:-3}" "launcher.jobs=${JOBS:-1}" run_dir="$folder/$1"
}

for pack in ${PACKS:-classic minatar}; do
  if [ "$pack" = classic ]; then
    study classic CartPole-v1,Acrobot-v1 MountainCar-v0 env=classic_pack "steps_per_task=${CLASSIC_STEPS:-100000}"
  else
    # The targets are the two games that can be learned within this budget. Samples per step and updates as in reproduce_minatar.sh.
    # MINATAR=hard: the targets are Asterix and Seaquest, which take longer.
    source=asterix,seaquest,space_invaders target=breakout,freeway
    if [ "${MINATAR:-easy}" = hard ]; then source=breakout,freeway,space_invaders target=asterix,seaquest; fi
    study "minatar_${MINATAR:-easy}" "$source" "$target" env=minatar_pack "steps_per_task=${MINATAR_STEPS:-200000}" \
      agent.samples_per_step=2 agent.batch_size=32 agent.target_period=0 compile=false threads=1
  fi
done
