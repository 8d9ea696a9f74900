#!/usr/bin/env bash
# One node's answer before ranks start: "NODE fit", or "NODE " and the first reason why not.
#
#   node_check.sh full     when the allocation is new
#   node_check.sh quick    before ranks start again in it: what Python would have to be imported for is left out
#
# A site adds its own test (fabric, mounts, temperatures) as an executable named by LDM_NODE_CHECK; what
# it prints is the reason when it fails.
set -uo pipefail

trap '' USR1 USR2 # for the ranks: the time limit is near
node=${SLURMD_NODENAME:-$(hostname)}
unfit() {
  printf '%s %s\n' "$node" "$*"
  exit 0
}
free_gib() { df --output=avail --block-size=1G "$1" 2>/dev/null | tail -n 1 | tr -d ' '; }

[[ -r $LDM_JOB_DIR/config.yaml ]] || unfit "cannot read $LDM_JOB_DIR: is the shared file system mounted?"

tmp=${TMPDIR:-/tmp}
probe=$(mktemp "$tmp/ldm-node-check.XXXXXX" 2>/dev/null) || unfit "cannot write to $tmp"
rm -f "$probe"
(($(free_gib "$tmp") >= ${LDM_MIN_TMP_GIB:-5})) || unfit "less than ${LDM_MIN_TMP_GIB:-5} GiB free in $tmp"
(($(free_gib /dev/shm) >= ${LDM_MIN_SHM_GIB:-4})) || unfit "less than ${LDM_MIN_SHM_GIB:-4} GiB free in /dev/shm"

gpus=${SLURM_GPUS_ON_NODE:-0}
if ((gpus)); then
  seen=$(timeout 60 nvidia-smi --list-gpus | grep -c '^GPU') || true
  ((seen >= gpus)) || unfit "nvidia-smi sees $seen of $gpus GPUs"
  # An uncorrected error, or a page or row to be replaced at the next reset, means wrong results or a crash within
  # hours. Pages are retired before Ampere, rows remapped since: a GPU answers N/A for what it does not have.
  errors=$(timeout 60 nvidia-smi --format=csv,noheader,nounits \
    --query-gpu=index,ecc.errors.uncorrected.volatile.total,retired_pages.pending |
    awk -F', ' '($2 + 0) > 0 || $3 == "Yes" { printf "%sGPU %s", sep, $1; sep = ", " }')
  [[ -z $errors ]] || unfit "uncorrected memory errors on $errors"
  rows=$(timeout 60 nvidia-smi --format=csv,noheader \
    --query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure |
    awk -F', ' '$2 == "Yes" || $3 == "Yes" || $2 + $3 > 0 { printf "%sGPU %s", sep, $1; sep = ", " }')
  [[ -z $rows ]] || unfit "rows of memory wait to be remapped, or cannot be, on $rows"
  strangers=$(timeout 60 nvidia-smi --query-compute-apps=pid --format=csv,noheader | wc -l)
  ((strangers == 0)) || unfit "$strangers foreign processes on the GPUs"
fi

# Every device multiplies a matrix, and every import the ranks need works here.
if [[ ${1:-full} == full ]]; then
  reason=$(timeout "${LDM_NODE_CHECK_TIMEOUT_S:-180}" "$LDM_PYTHON" - 2>&1 <<'PYTHON'
import torch, trainer.train
devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
for device in devices:
    a = torch.full((256, 256), 0.5, device=device)
    assert (a @ a).mean().item() == 64.0, f"{device} multiplies wrongly"
PYTHON
) || unfit "python: $(tail -n 1 <<<"$reason")"
fi

if [[ -n ${LDM_NODE_CHECK:-} ]]; then
  reason=$("$LDM_NODE_CHECK" 2>&1) || unfit "$LDM_NODE_CHECK: $(tail -n 1 <<<"$reason")"
fi
printf '%s fit\n' "$node"
