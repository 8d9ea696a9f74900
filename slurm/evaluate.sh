#!/usr/bin/env bash
# An evaluator beside a run: draws from what the run commits, measures, marks the best. docs/evaluation.md
#
#   sbatch slurm/evaluate.sh s3://bucket/run --reference s3://bucket/val.safetensors \
#     --sample '--count 5000 --prompts-from s3://bucket/prompts.txt --steps 25'
#   sbatch --gpus-per-node=8 --ntasks-per-node=8 slurm/evaluate.sh ...     # several GPUs share the pictures
#
# Submit it with the run, before or after: it waits for the first checkpoint, outlives the run's requeues, whose
# folder stays the same, and ends when the last step is measured. It is requeued itself, before its time limit
# and after faults, and goes on with the pictures that it has. A mistake in the command (exit code 2) ends it.
#
# Arguments are those of `ldm evaluate watch`. LDM_PYTHON, LDM_REPOSITORY and LDM_MAX_RESTARTS are as in
# train_ldm.sh.
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
if [[ -z ${LDM_PYTHON:-} ]]; then
  LDM_PYTHON=$repository/.venv/bin/python
  [[ -x $LDM_PYTHON ]] || LDM_PYTHON=python3
fi
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

again=0
trap 'say "the time limit is near"; again=1; kill "$evaluator" 2>/dev/null || true' USR1
tasks=${SLURM_NTASKS_PER_NODE:-1}
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $tasks rank(s) per node"
srun --ntasks="$((${SLURM_NNODES:-1} * tasks))" --ntasks-per-node="$tasks" --kill-on-bad-exit=1 \
  "$LDM_PYTHON" -m trainer evaluate watch "$@" &
evaluator=$!
status=0
# A trapped signal ends `wait` early; only a vanished srun ends the loop.
while kill -0 "$evaluator" 2>/dev/null; do
  status=0
  wait "$evaluator" || status=$?
done
if ((again)); then requeue 75; fi
case $status in
  0) say "the last step is measured" ;;
  2 | 77 | 78 | 130) say "ended with status $status, not requeued" ;;
  *) requeue "$status" ;;
esac
exit "$status"
