#!/usr/bin/env bash
# Fill first_stage.cache ahead of a run, or beside it, as a job array: each task encodes its part of every batch
# of the run, in the run's order. docs/caching.md
#
#   sbatch --array=0-15 slurm/encode.sh configs/sd/sd2_base_512.yaml first_stage.cache=s3://bucket/cache \
#     data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors \
#     conditioning.openclip.pretrained=laion2b_s32b_b79k
#   sbatch --array=0-3 --gpus-per-node=8 --ntasks-per-node=8 slurm/encode.sh ...   # 32 parts on four whole nodes
#   sbatch --array=0-15 --gpus-per-node=0 --cpus-per-task=16 slurm/encode.sh ...   # on CPUs
#   sbatch --array=0-15 slurm/encode.sh CONFIG --ahead 1000 run_dir=s3://bucket/run ...  # in front of a run
#
# Arguments are those of `ldm encode` but --ranks and --rank. Tasks need nothing of each other: any number may run
# at a time (--array=0-15%4), in any order. A task is requeued by itself, before its time limit and after faults;
# what is in the cache is passed over, so nothing is encoded twice but what was not yet stored when it was killed.
# A mistake in the command (exit code 2) ends it. LDM_ENCODE_PARTS=16 with --array=3,7 does these two of 16 again.
# LDM_PYTHON, LDM_REPOSITORY, LDM_CONTAINER, LDM_MOUNTS and LDM_MAX_RESTARTS are as in train_ldm.sh.
#
# USR1 goes to the encoders (not to this script) 120 s before the time limit: they store what they have.
#SBATCH --job-name=ldm-encode
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --output=ldm-encode-%A_%a.log

set -euo pipefail

say() { printf '%s encode: %s\n' "$(date +%FT%T)" "$*"; }

if [[ -z ${SLURM_JOB_ID:-} ]] || (($# == 0)); then
  echo "usage: sbatch [--array=0-15 ...] slurm/encode.sh CONFIG [a.b=c ...] [options of ldm encode]" >&2
  exit 2
fi

# Which of how many parts this task does.
job_key=$SLURM_JOB_ID # to SLURM, the number of one task of an array may mean all of them
parts=1 part=0
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  job_key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
  parts=$SLURM_ARRAY_TASK_COUNT part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
  if [[ -n ${LDM_ENCODE_PARTS:-} ]]; then
    parts=$LDM_ENCODE_PARTS part=$SLURM_ARRAY_TASK_ID
  elif ((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 != parts)); then
    say "the numbers of this array have gaps: say how many parts there are in all, LDM_ENCODE_PARTS=N sbatch ..."
    exit 2
  fi
fi
if ((part < 0 || part >= parts)); then
  say "task $part is none of LDM_ENCODE_PARTS=$parts parts, which count from 0"
  exit 2
fi

# SLURM runs a spooled copy of this file; where the original lies, and with it the code, it remembers.
submitted=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | head -n 1)
repository=${LDM_REPOSITORY:-$(dirname "$(dirname "${submitted# Command=}")")}
# shellcheck source=slurm/container.sh
source "$repository/slurm/container.sh"
export PYTHONPATH=$repository PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Several tasks of a node share the part; each takes the GPU of its place.
tasks=$((${SLURM_NNODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))
export LDM_ENCODE_RANKS=$((parts * tasks)) LDM_ENCODE_FIRST=$((part * tasks))
# shellcheck disable=SC2016 # each task expands it
encoder='IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
  if ((${#gpus[@]} > 1)); then export CUDA_VISIBLE_DEVICES=${gpus[SLURM_LOCALID % ${#gpus[@]}]}; fi
  exec "$LDM_PYTHON" -m trainer encode "$@" --ranks "$LDM_ENCODE_RANKS" --rank "$((LDM_ENCODE_FIRST + SLURM_PROCID))"'

trap 'say "SIGTERM: the encoders have it too; waiting for them to store what they have"' TERM
say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: part $part of $parts, $tasks rank(s)"
srun --ntasks="$tasks" --ntasks-per-node="${SLURM_NTASKS_PER_NODE:-1}" --kill-on-bad-exit=0 \
  "${srun_container[@]}" "${in_container[@]}" bash -c "$encoder" encode "$@" &
encoders=$!
status=0
# A trapped signal ends `wait` early; only a vanished srun ends the loop.
while kill -0 "$encoders" 2>/dev/null; do
  status=0
  wait "$encoders" || status=$?
done
state=$(scontrol --oneliner show job "$job_key" | sed -nE 's/.* JobState=([^ ]*).*/\1/p' | head -n 1)
say "ended with status $status; job is $state"
case $status in
  0 | 1 | 2 | 77 | 78 | 130) exit "$status" ;; # 1: its storage takes no more, and would not the next time
esac
# COMPLETING: somebody cancelled the job, or SLURM is already requeueing it. Both are their decision.
if [[ $state == RUNNING ]]; then
  if ((${SLURM_RESTART_COUNT:-0} >= ${LDM_MAX_RESTARTS:-1000})); then
    say "LDM_MAX_RESTARTS=${LDM_MAX_RESTARTS:-1000} restarts are used up"
  else
    (trap '' TERM && scontrol requeue "$job_key") # which ends this very script with SIGTERM
  fi
fi
exit "$status"
