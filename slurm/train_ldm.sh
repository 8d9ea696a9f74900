#!/usr/bin/env bash
# Train one run on a SLURM allocation, start it again there after faults, and requeue it when the allocation
# is gone or too small, until it is done. Read slurm/README.md once.
#
#   sbatch --nodes=32 slurm/train_ldm.sh configs/sd/sd2_base_256.yaml run_dir=s3://bucket/run \
#     data.shards='s3://bucket/laion/*.tar' first_stage.weights=s3://bucket/kl_f8.safetensors \
#     conditioning.openclip.pretrained=laion2b_s32b_b79k
#   sbatch --nodes=4 --array=0-4 slurm/train_ldm.sh CONFIG       # five seeds, five run folders
#   LDM_SPARE_NODES=2 sbatch --nodes=34 slurm/train_ldm.sh CONFIG  # 32 train, 2 wait to replace others
#
# One srun task is one rank is one GPU: SLURM itself then knows which rank died on which node, and
# nothing stands between its signals and the trainer. Tasks are not bound to single GPUs, because a
# rank that cannot see its neighbours' GPUs loses NVLink peer access; each takes number SLURM_LOCALID.
#
# Options on the sbatch command line win over these lines. USR1 goes to the ranks (not to this script)
# 300 s before the time limit: they save at the next step, exit 75, and the job is requeued. A node that
# fails takes its ranks with it, not the job (--no-kill), unless it is the first one, where this script runs.
#SBATCH --job-name=ldm
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=ldm-%j.log

set -euo pipefail

say() { printf '%s train_ldm: %s\n' "$(date +%FT%T)" "$*"; }

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "usage: sbatch [--nodes=N ...] slurm/train_ldm.sh CONFIG [a.b=c ...]" >&2
  exit 2
fi

allocation=${SLURM_RESTART_COUNT:-0}
job_key=$SLURM_JOB_ID # to SLURM, the number of one task of an array may mean all of them
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job_key=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
# On a file system that every node sees.
job_dir=${LDM_JOBS_DIR:-$SLURM_SUBMIT_DIR/runs/slurm}/$job_key
mkdir -p "$job_dir"
attempt=0 # the newest that there was, before a requeue
starts=0  # of ranks, in all of them: an attempt without enough fit nodes has none
for folder in "$job_dir"/attempt-*/; do
  number=${folder%/} number=${number##*-}
  if [[ $number =~ ^[0-9]+$ ]] && ((number > attempt)); then attempt=$number; fi
  if [[ -e ${folder}launched.json ]]; then starts=$((starts + 1)); fi
done

# SLURM runs a spooled copy of this file; where the original lies, and with it the code, it remembers.
submitted=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep -o ' Command=[^ ]*' | head -n 1)
repository=${LDM_REPOSITORY:-$(dirname "$(dirname "${submitted# Command=}")")}
code=$job_dir/code # the copy, once it is there
[[ -e $code/slurm/container.sh ]] || code=$repository
# shellcheck source=slurm/container.sh
source "$code/slurm/container.sh"
export LDM_JOB_DIR=$job_dir LDM_FAULTS=$job_dir/faults.jsonl
say "job $job_key on $SLURM_JOB_NODELIST; logs and snapshot in $job_dir"
# Of the site, and the one notice here that nobody could lengthen for this job.
grace=$(scontrol show config | sed -nE 's/^KillWait *= *([0-9]+).*/\1/p') || true
say "scancel and preemption leave ${grace:-an unknown number of} s to save (KillWait); ldm stop leaves all it takes"

# Python on this node, for the decisions below; under pyxis only a step can enter the image.
if ((${#srun_container[@]})); then
  python() {
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --quiet "${srun_container[@]}" "$LDM_PYTHON" "$@"
  }
else
  python() { "${in_container[@]}" "$LDM_PYTHON" "$@"; }
fi

# What was submitted is what runs, however often the job starts: configuration and code are copied
# once, and every attempt imports the copy. Relative paths still mean the folder of the submission,
# which is why the working directory stays and must not be searched for modules.
export PYTHONSAFEPATH=1
cd "$SLURM_SUBMIT_DIR"
# Of a cluster that shares this file system, or from before its numbers began again; that job may still run.
if ((allocation == 0)) && [[ -e $job_dir/submission.json ]]; then
  say "$job_dir belongs to another job of this number: remove it, or submit with LDM_JOBS_DIR=FOLDER of this cluster"
  say "not started, and not requeued (exit 2)"
  exit 2
fi
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

# shellcheck source=slurm/network.sh
source "$job_dir/code/slurm/network.sh"

tasks_per_node=${SLURM_NTASKS_PER_NODE:-1}
cpus_per_task=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE / tasks_per_node))}
if ((cpus_per_task < 1)); then cpus_per_task=1; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Ask SLURM, whose controller may be away for some minutes.
ask() {
  local answer
  for _ in {1..60}; do
    if answer=$("$@"); then
      printf '%s\n' "$answer"
      return
    fi
    pause 5
  done
  say "SLURM does not answer: $*" >&2
}
field() { ask scontrol --oneliner show job "$job_key" | sed -nE "s/ $1=([^ ]*).*/\\n\\1/; s/.*\\n//p"; }
now() { date +%s.%N; }
joined() { local IFS=,; printf '%s' "$*"; }
compact() { if (($#)); then scontrol show hostlist "$(joined "$@")"; fi; }
contains() { [[ " ${*:2} " == *" $1 "* ]]; }

# Nodes of the allocation that answer SLURM, in its order, and those of them that it would not give away again.
have=() drained=()
survey() {
  local list node state
  declare -A states=()
  list=$(field NodeList)
  while read -r node state; do states[$node]=$state; done < <(
    ask sinfo --all --noheader --Node --nodes="$list" --format='%N %T'
  )
  have=() drained=()
  while read -r node; do
    case ${states[$node]:-unknown} in
      down* | fail | unknown* | power* | reboot* | *\*) continue ;;
      drain* | failing) drained+=("$node") ;;
    esac
    have+=("$node")
  done < <(scontrol show hostnames "$list")
}

# Whether the job keeps its nodes for long enough to start again on them.
stopping=
ending() {
  local end
  if [[ -n $stopping || $(field JobState) != RUNNING ]]; then return 0; fi
  end=$(field EndTime)
  [[ $end != Unknown ]] && (($(date -d "$end" +%s) - $(date +%s) < ${LDM_MIN_TIME_S:-600}))
}

# Each node says that it is fit, or why not. Silence is an answer too, unless SLURM could not reach one node:
# then it has ended the check on all, and the others are asked again.
unfit=()
check_nodes() { # full | quick, nodes
  local node verdict limit=${LDM_NODE_CHECK_TIMEOUT_S:-180} log=$attempt_dir/nodes.log errors=$attempt_dir/nodes.err
  local -a nodes=("${@:2}") unreached silent
  unfit=()
  if [[ ${LDM_SKIP_NODE_CHECK:-0} == 1 ]]; then return; fi
  for _ in 1 2 3; do
    timeout --kill-after=10 "$limit" srun --overlap --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" \
      --ntasks-per-node=1 --nodelist="$(joined "${nodes[@]}")" --kill-on-bad-exit=0 \
      "${srun_container[@]}" "${in_container[@]}" bash "$job_dir/code/slurm/node_check.sh" "$1" \
      >"$log" 2>"$errors" || true
    mapfile -t unreached < <(sed -nE 's/.*(Node failure on|failed on node) ([^ :]+).*/\2/p' "$errors" | sort -u)
    silent=()
    for node in "${nodes[@]}"; do
      verdict=$(grep "^$node " "$log" | tail -n 1 || true)
      if [[ $verdict == "$node fit" ]]; then continue; fi
      if ! contains "$node" "${have[@]}"; then verdict="$node is no longer in the allocation"; fi
      if contains "$node" "${unreached[@]}"; then verdict="$node cannot be reached"; fi
      if [[ -n $verdict ]] || { ((${#unreached[@]} == 0)) && ! grep -q 'Unable to create' "$errors"; }; then
        say "unfit node: ${verdict:-$node gave no answer in $limit s}"
        unfit+=("$node")
      else
        silent+=("$node")
      fi
    done
    nodes=("${silent[@]}")
    if ((${#nodes[@]} == 0)); then return; fi
    survey
  done
  say "unfit nodes: no answer from ${nodes[*]}"
  unfit+=("${nodes[@]}")
}

# Whether srun has told of a task that ended otherwise than done (0), preempted (75) or stopped (77).
has_fault() {
  [[ -s $1 ]] && awk '/^srun: error: / {
      if (/Node failure on|failed on node/ || (/: tasks? [^:]+: / && !/exit code 7[57]$/)) { found = 1; exit }
    } END { exit !found }' "$1"
}

# End the ranks that are left after a fault: their stacks first, and no mercy for those that hang.
end_ranks() {
  # The word by which slurm_verdict.py knows that what follows was our doing.
  printf 'train_ldm: Terminating StepId: a rank has failed, and others go on\n' >>"$attempt_dir/srun.log"
  signal_ranks QUIT
  pause 1
  signal_ranks KILL
}
signal_ranks() { # in the background: scancel waits for nodes that do not answer
  local step
  while read -r step; do timeout 60 scancel --signal="$1" "$step" & done < <(
    timeout 10 squeue --steps --noheader --jobs="$job_key" --format='%i %j' | awk '/ ldm-ranks$/ { print $1 }'
  )
}

# Sleep without a process, and without putting off a signal for longer.
exec {silence}<> <(:)
pause() { read -r -t "$1" -u "$silence" || true; }

tell_recovery() {
  local sentence
  sentence=$(python -m trainer.launch.slurm_job recovered "$job_dir" --attempt "$attempt")
  if [[ -n $sentence ]]; then say "$sentence"; fi
}

# Run the ranks on the chosen nodes to their end: sets status, and how the end came about.
run_ranks() {
  local -a nodes=("$@")
  local log=$attempt_dir/srun.log address deadline='' killed='' told='' srun_pid
  local tasks=$((${#nodes[@]} * tasks_per_node))
  # Where the ranks meet. NodeAddr is what SLURM itself reaches the node by, also where DNS does not.
  address=$(ask scontrol --oneliner show node "${nodes[0]}" | sed -nE 's/.* NodeAddr=([^ ]*).*/\1/p')
  export MASTER_ADDR=${LDM_MASTER_ADDR:-$address}
  export MASTER_PORT=${LDM_MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + attempt) % 10000))}
  export LDM_START_REPORT=$attempt_dir/start.json
  say "attempt $attempt: starting $tasks ranks on $used, rendezvous at $MASTER_ADDR:$MASTER_PORT"
  export LDM_STARTS=$starts
  starts=$((starts + 1))
  printf '{"time": %s}\n' "$(now)" >"$attempt_dir/launched.json"
  # --wait, not --kill-on-bad-exit: a rank that is still uploading its last checkpoint finishes it. --overlap: a
  # step of the attempt before whose node is lost keeps its place in SLURM's books.
  srun --job-name=ldm-ranks --overlap --nodes="${#nodes[@]}" --nodelist="$(joined "${nodes[@]}")" --ntasks="$tasks" \
    --ntasks-per-node="$tasks_per_node" --cpus-per-task="$cpus_per_task" \
    --kill-on-bad-exit=0 --wait="${LDM_WAIT_S:-300}" --output="$attempt_dir/rank-%4t.log" \
    "${srun_container[@]}" "${in_container[@]}" "$LDM_PYTHON" -m trainer train "$job_dir/config.yaml" \
    2>>"$log" &
  srun_pid=$!
  while kill -0 "$srun_pid" 2>/dev/null; do
    pause 0.3
    if [[ -z $told && -e $LDM_START_REPORT ]]; then
      told=1
      if [[ $mode == quick ]]; then tell_recovery & fi
    fi
    if [[ -z $seen ]] && has_fault "$log"; then
      fault=$(stat --format=%.6Y "$log") seen=$(now)
      deadline=$((SECONDS + ${LDM_FAULT_WAIT_S:-5}))
    elif [[ -n $deadline && -z $killed ]] && ((SECONDS >= deadline)); then
      killed=1 deadline=$((SECONDS + ${LDM_KILL_WAIT_S:-10}))
      end_ranks
    elif [[ -n $killed && -z $stuck ]] && ((SECONDS >= deadline)); then
      stuck=--stuck # some node does not even answer SLURM
      kill -KILL "$srun_pid" || true
    fi
  done
  status=0
  wait "$srun_pid" || status=$?
  over=$(now)
  if ((status)) && [[ -z $seen ]]; then fault=$over seen=$over; fi
  cat "$log"
  if ((status)); then
    signal_ranks KILL # if it was srun that died
    tail -n 5 "$attempt_dir"/rank-*.log | tail -n 60 || true # none, where srun could not start any
  fi
}

# Without accounting (slurmdbd), SLURM changes no job that has lost a node; that node is down then, anyway.
exclude_nodes() {
  for _ in 1 2 3; do
    if scontrol update "JobId=$job_key" "ExcNodeList=$1"; then return; fi
    pause 1
  done
  say "SLURM does not exclude $1; where they are up again, it may give them to this job again"
}

# The end of an attempt: what it meant, what was learnt about the nodes, and whether to go on. Returns when the
# ranks are to be started again on `candidates`, `count` of them.
finish() { # further arguments for `decide`
  local verdict action code exclude reason state already
  local -a words=(--unfit "${unfit[@]}")
  survey
  if [[ -n $seen ]]; then words+=(--fault "$fault" --seen "$seen"); fi
  if ending; then words+=(--ending); fi
  verdict=$(python -m trainer.launch.slurm_job decide "$job_dir" --attempt "$attempt" --allocation "$allocation" \
    --started "$started" --status "$status" --nodes "$used" --wanted "$wanted" --tasks-per-node "$tasks_per_node" \
    --have "${have[@]}" --drained "${drained[@]}" "${words[@]}" "$@") ||
    verdict="requeue $status - 0" # a node that cannot even run Python: SLURM's own restart count still bounds us
  {
    read -r action code exclude count
    read -r -a candidates || candidates=()
    read -r reason || reason="this could not be judged"
  } <<<"$verdict"
  if [[ $action == requeue && $allocation -ge ${LDM_MAX_RESTARTS:-1000} ]]; then
    say "LDM_MAX_RESTARTS=${LDM_MAX_RESTARTS:-1000} requeues are used up"
    action=stop
  fi
  state=$(field JobState)
  say "attempt $attempt ended with status $status: $action, $reason; nodes to exclude: $exclude; job is $state"
  if [[ $action == restart && -z $stopping && $state == RUNNING ]]; then return; fi
  if [[ $action == "done" || $action == stop ]]; then exit "$code"; fi
  # COMPLETING: somebody cancelled the job, or SLURM is already requeueing it. Both are their decision.
  if [[ $state != RUNNING ]]; then exit "$status"; fi
  already=$(field ExcNodeList)
  if [[ $exclude != - && $already != "(null)" ]]; then exclude=$already,$exclude; fi
  # The requeue ends this very script with SIGTERM, so what follows it must not care.
  (
    trap '' TERM
    ask scontrol requeue "$job_key"
    if [[ $exclude != - ]]; then exclude_nodes "$exclude"; fi
  )
  exit "$status"
}

trap 'stopping=1; say "SIGTERM: the ranks have it too; waiting for them to save"' TERM
unset SLURM_NO_KILL # the job outlives a node, the ranks' step does not
wanted=$((SLURM_NNODES - ${LDM_SPARE_NODES:-0}))
survey
candidates=("${have[@]}") count=$wanted mode=full

while :; do
  attempt=$((attempt + 1))
  attempt_dir=$job_dir/attempt-$attempt
  mkdir -p "$attempt_dir"
  export LDM_RESTARTS=$((attempt - 1))
  started=$(now) fault='' seen='' over='' stuck='' status=0 taken=() chosen=()
  used=$(compact "${candidates[@]}")
  check_nodes "$mode" "${candidates[@]}"
  for node in "${candidates[@]}"; do
    if ((${#taken[@]} < count)) && ! contains "$node" "${unfit[@]}"; then taken+=("$node"); fi
  done
  if ((${#taken[@]} < count)); then
    status=76
    finish
    mode=quick
    continue
  fi
  for node in "${have[@]}"; do # the first of SLURM's order has rank 0
    if contains "$node" "${taken[@]}"; then chosen+=("$node"); fi
  done
  used=$(compact "${chosen[@]}")
  run_ranks "${chosen[@]}"
  finish --srun-log "$attempt_dir/srun.log" --over "$over" ${stuck:+"$stuck"}
  mode=quick # what takes longer was looked at when the allocation was new
done
