#!/usr/bin/env bash
# An evaluator beside a run: draws from what the run commits, measures, marks the best. docs/evaluation.md
#
#   sbatch slurm/evaluate.sh s3://bucket/run --reference s3://bucket/val.safetensors \
#     --sample '--count 5000 --prompts-from s3://bucket/prompts.txt --steps 25'
#   sbatch --gpus-per-node=8 --ntasks-per-node=8 slurm/evaluate.sh ...     # several GPUs share the pictures
#
# `ldm slurm submit CONFIG --evaluate='--reference ...'` submits it with the run. By hand, before or after: it waits
# for the first checkpoint, outlives the run's requeues, whose folder stays the same, and ends when the last step is
# measured. With LDM_RUN_JOB, the run's job, it also ends when that has left the queue for good, stopped, cancelled or
# failed: it measures what is left, and does not wait for more. It is requeued itself, before its time limit and after
# faults, and goes on with the pictures that it has. A mistake in the command (exit code 2) ends it.
#
# Arguments are those of `ldm evaluate watch`. LDM_PYTHON, LDM_REPOSITORY, LDM_CONTAINER, LDM_MOUNTS and
# LDM_MAX_RESTARTS are as in train_ldm.sh. With LDM_RUN_SEED, the seed of an array of runs, each task of this array
# has the run of its number.
#SBATCH --job-name=ldm-evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
#SBATCH --output=ldm-evaluate-%j.log

set -euo pipefail

say() { printf '%s evaluate: %s\n' "$(date +%FT%T)" "$*"; }

if [[ -z ${SLURM_JOB_ID:-} ]] || (($# == 0)); then
  echo "usage: sbatch slurm/evaluate.sh RUN --reference PICTURES --sample '--count N ...' [options of ldm evaluate watch]" >&2
  exit 2
fi

job_key=$SLURM_JOB_ID # to SLURM, the number of one task of an array may mean all of them
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi

# SLURM runs a spooled copy of this file; where the original lies, and with it the code, it remembers.
submitted=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | head -n 1)
repository=${LDM_REPOSITORY:-$(dirname "$(dirname "${submitted# Command=}")")}
# shellcheck source=slurm/container.sh
source "$repository/slurm/container.sh"
export PYTHONPATH=$repository PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# In a subshell that ignores SIGTERM, by which the requeue ends this very script.
requeue() {
  if ((${SLURM_RESTART_COUNT:-0} >= ${LDM_MAX_RESTARTS:-1000})); then
    say "LDM_MAX_RESTARTS=${LDM_MAX_RESTARTS:-1000} restarts are used up"
    exit "$1"
  fi
  say "requeued; what is drawn is kept"
  (trap '' TERM && scontrol requeue "$job_key")
  exit "$1"
}

# What of an array is this task's: the run and its job.
run_job=${LDM_RUN_JOB:-}
if [[ -n ${SLURM_ARRAY_TASK_ID:-} && -n ${LDM_RUN_SEED:-} ]]; then
  set -- "${1%/}/seed-$((LDM_RUN_SEED + SLURM_ARRAY_TASK_ID))" "${@:2}"
  if [[ -n $run_job ]]; then run_job=${run_job}_$SLURM_ARRAY_TASK_ID; fi
fi

# Whether SLURM has nothing more to do with the run's job. A controller that does not answer has not said so.
ended='^(BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|TIMEOUT)$'
run_is_over() {
  local states
  if states=$(squeue --noheader --states=all --jobs="$run_job" --format=%T 2>&1); then
    ! grep -qvE "$ended" <<<"$states" || [[ -z $states ]]
  else
    [[ $states == *"Invalid job id"* ]] # forgotten, some minutes after its end
  fi
}
# Twice in a row: a job that is being requeued may bear the name of its end for a moment.
await_end() {
  local looks=0
  while ((looks < 2)); do
    sleep "${LDM_RUN_POLL_S:-60}" &
    wait $!
    if run_is_over; then looks=$((looks + 1)); else looks=0; fi
  done
}

tasks=${SLURM_NTASKS_PER_NODE:-1}
# Evaluate until it ends or is ended: sets status.
evaluate() {
  srun --ntasks="$((${SLURM_NNODES:-1} * tasks))" --ntasks-per-node="$tasks" --kill-on-bad-exit=1 \
    "${srun_container[@]}" "${in_container[@]}" "$LDM_PYTHON" -m trainer evaluate watch "$@" &
  evaluator=$!
  status=0
  # A trapped signal ends `wait` early; only a vanished srun ends the loop.
  while kill -0 "$evaluator" 2>/dev/null; do
    status=0
    wait "$evaluator" || status=$?
  done
}

again=0 over=0
trap 'say "the time limit is near"; again=1; kill "$evaluator" 2>/dev/null || true' USR1
trap 'say "job $run_job of the run is over"; over=1; kill "$evaluator" 2>/dev/null || true' USR2
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $tasks rank(s) per node"
looking=
if [[ -n $run_job ]]; then
  (trap '' USR1 && await_end && kill -USR2 "$$") &
  looking=$!
fi
evaluate "$@"
if ((over && !again && status != 0)); then evaluate "$@" --once; fi
if [[ -n $looking ]]; then kill "$looking" 2>/dev/null || true; fi
if ((again)); then requeue 75; fi
case $status in
  0) say "all is measured" ;;
  2 | 77 | 78 | 130) say "ended with status $status, not requeued" ;;
  *) requeue "$status" ;;
esac
exit "$status"
