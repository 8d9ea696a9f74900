#!/usr/bin/env bash
# Train one run on a SLURM allocation and requeue it until it is done. Read slurm/README.md once.
#
#   sbatch --nodes=32 slurm/train_ldm.sh configs/sd/sd2_base_256.yaml run_dir=s3://bucket/run \
#     data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors \
#     conditioning.openclip.pretrained=laion2b_s32b_b79k
#   sbatch --nodes=4 --array=0-4 slurm/train_ldm.sh CONFIG       # five seeds, five run folders
#
# One srun task is one rank is one GPU: SLURM itself then knows which rank died on which node, and
# nothing stands between its signals and the trainer. Tasks are not bound to single GPUs, because a
# rank that cannot see its neighbours' GPUs loses NVLink peer access; each takes number SLURM_LOCALID.
#
# Options on the sbatch command line win over these lines. USR1 goes to the ranks (not to this script)
# 300 s before the time limit: they save at the next step, exit 75, and the job is requeued.
#SBATCH --job-name=ldm
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=ldm-%j.log

set -euo pipefail

say() { printf '%s train_ldm: %s\n' "$(date +%FT%T)" "$*"; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch [--nodes=N ...] slurm/train_ldm.sh CONFIG [a.b=c ...]" >&2
  exit 2
fi

attempt=$((${SLURM_RESTART_COUNT:-0} + 1))
job_key=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
# On a file system that every node sees.
job_dir=${LDM_JOBS_DIR:-$SLURM_SUBMIT_DIR/runs/slurm}/$job_key
attempt_dir=$job_dir/attempt-$attempt
mkdir -p "$attempt_dir"

# SLURM runs a spooled copy of this file; where the original lies, and with it the code, it remembers.
submitted=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | head -n 1)
repository=${LDM_REPOSITORY:-$(dirname "$(dirname "${submitted# Command=}")")}
if [[ -z ${LDM_PYTHON:-} ]]; then
  LDM_PYTHON=$repository/.venv/bin/python
  [[ -x $LDM_PYTHON || -n ${LDM_CONTAINER:-} ]] || LDM_PYTHON=python3
fi
export LDM_PYTHON LDM_JOB_DIR=$job_dir LDM_FAULTS=$job_dir/faults.jsonl
say "job $job_key, attempt $attempt on $SLURM_JOB_NODELIST; logs and snapshot in $job_dir"

# Optional container: a .sif runs under apptainer, anything else is an image for enroot/pyxis.
srun_container=() in_container=()
if [[ ${LDM_CONTAINER:-} == *.sif ]]; then
  in_container=(apptainer exec --nv --bind "$SLURM_SUBMIT_DIR,$job_dir${LDM_MOUNTS:+,$LDM_MOUNTS}" "$LDM_CONTAINER")
elif [[ -n ${LDM_CONTAINER:-} ]]; then
  srun_container=(--container-image="$LDM_CONTAINER"
    --container-mounts="$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR,$job_dir:$job_dir,$repository:$repository${LDM_MOUNTS:+,$LDM_MOUNTS}"
    --no-container-mount-home)
fi
# Python on this node, for the decisions below; under pyxis only a step can enter the image.
if ((${#srun_container[@]})); then
  python() { srun --overlap --nodes=1 --ntasks=1 --quiet "${srun_container[@]}" "$LDM_PYTHON" "$@"; }
else
  python() { "${in_container[@]}" "$LDM_PYTHON" "$@"; }
fi

# What was submitted is what runs, however often the job starts: configuration and code are copied
# once, and every attempt imports the copy. Relative paths still mean the folder of the submission,
# which is why the working directory stays and must not be searched for modules.
export PYTHONSAFEPATH=1
cd "$SLURM_SUBMIT_DIR"
if [[ ! -e $job_dir/submission.json ]]; then
  if (($# == 0)); then
    say "no configuration given: sbatch slurm/train_ldm.sh CONFIG [a.b=c ...]"
    exit 2
  fi
  status=0
  PYTHONPATH=$repository python -m trainer.launch.slurm_job prepare "$job_dir" "$repository" "$@" || status=$?
  if ((status)); then
    say "not started, and not requeued (exit $status)"
    exit "$status"
  fi
fi
export PYTHONPATH=$job_dir/code
# A run that is requeued before its first checkpoint still goes on under one W&B id; from the first
# checkpoint on, the id in the checkpoint wins.
if [[ -z ${WANDB_RUN_ID:-} ]]; then
  WANDB_RUN_ID=$(<"$job_dir/wandb_run_id")
  export WANDB_RUN_ID WANDB_RESUME=allow
fi

# Where the ranks meet. NodeAddr is what SLURM itself reaches the node by, also where DNS does not.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$first_node" | grep -o ' NodeAddr=[^ ]*' | head -n 1)
export MASTER_ADDR=${LDM_MASTER_ADDR:-${address# NodeAddr=}}
export MASTER_PORT=${LDM_MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + attempt) % 10000))}
# shellcheck source=slurm/network.sh
source "$job_dir/code/slurm/network.sh"

tasks_per_node=${SLURM_NTASKS_PER_NODE:-1}
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
if ((cpus_per_task < 1)); then cpus_per_task=1; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The end of an attempt: what it meant, what was learnt about the nodes, and whether to go on.
finish() { # exit status, further arguments for `decide`
  local status=$1 verdict state
  shift
  verdict=$(python -m trainer.launch.slurm_job decide "$job_dir" \
    --attempt "$attempt" --started "$started" --status "$status" --nodes "$SLURM_JOB_NODELIST" "$@") ||
    verdict="requeue -" # a node that cannot even run Python: SLURM's own restart count still bounds us
  local action=${verdict%% *} exclude=${verdict##* } already
  if [[ $action == requeue && ${SLURM_RESTART_COUNT:-0} -ge ${LDM_MAX_RESTARTS:-1000} ]]; then
    say "LDM_MAX_RESTARTS=${LDM_MAX_RESTARTS:-1000} restarts are used up"
    action=stop
  fi
  state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' JobState=[^ ]*' | head -n 1)
  say "attempt $attempt ended with status $status: $action, nodes to exclude: $exclude; job is ${state# JobState=}"
  if [[ $action != requeue ]]; then exit "$status"; fi
  # COMPLETING: somebody cancelled the job, or SLURM is already requeueing it. Both are their decision.
  if [[ ${state# JobState=} != RUNNING ]]; then exit "$status"; fi
  already=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' ExcNodeList=[^ ]*' | head -n 1)
  already=${already# ExcNodeList=}
  if [[ $exclude != - && $already != "(null)" ]]; then exclude=$already,$exclude; fi
  # The requeue ends this very script with SIGTERM, so what follows it must not care.
  (
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID"
    if [[ $exclude != - ]]; then scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$exclude"; fi
  )
  exit "$status"
}

started=$(date +%s)

# Each node says that it is fit, or why not. Silence is an answer too.
if [[ ${LDM_SKIP_NODE_CHECK:-0} != 1 ]]; then
  timeout "${LDM_NODE_CHECK_TIMEOUT_S:-180}" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --kill-on-bad-exit=0 "${srun_container[@]}" "${in_container[@]}" bash "$job_dir/code/slurm/node_check.sh" \
    >"$attempt_dir/nodes.log" 2>"$attempt_dir/nodes.err" || true
  unfit=()
  while read -r node; do
    verdict=$(grep "^$node " "$attempt_dir/nodes.log" | tail -n 1 || true)
    if [[ $verdict != "$node fit" ]]; then
      say "unfit node: ${verdict:-$node gave no answer in ${LDM_NODE_CHECK_TIMEOUT_S:-180} s}"
      unfit+=("$node")
    fi
  done < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  if ((${#unfit[@]})); then
    finish 76 --unfit "${unfit[@]}"
  fi
fi

# --wait, not --kill-on-bad-exit: when one rank is gone the others get the time to notice, write their
# stacks and stop by themselves, and a rank that is still uploading its last checkpoint finishes it.
say "starting $((SLURM_NNODES * tasks_per_node)) ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT"
trap 'say "SIGTERM: the ranks have it too; waiting for them to save"' TERM
status=0
srun --ntasks="$((SLURM_NNODES * tasks_per_node))" --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" \
  --kill-on-bad-exit=0 --wait="${LDM_WAIT_S:-300}" --output="$attempt_dir/rank-%4t.log" \
  "${srun_container[@]}" "${in_container[@]}" "$LDM_PYTHON" -m trainer train "$job_dir/config.yaml" \
  2>"$attempt_dir/srun.log" &
srun_pid=$!
# A trapped signal ends `wait` early; only a vanished srun ends the loop.
while kill -0 "$srun_pid" 2>/dev/null; do
  status=0
  wait "$srun_pid" || status=$?
done
cat "$attempt_dir/srun.log"
if ((status)); then tail -n 5 "$attempt_dir"/rank-*.log | tail -n 60; fi
finish "$status" --srun-log "$attempt_dir/srun.log"
