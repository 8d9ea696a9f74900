# The interpreter, and the container around it where LDM_CONTAINER names one. Sourced by train_ldm.sh, encode.sh and
# evaluate.sh, which know `repository` by then, and `job_dir` where the job has one. A .sif runs under apptainer,
# anything else is an image for enroot/pyxis.
# shellcheck shell=bash disable=SC2034,SC2154 # names of who sources it

if [[ -z ${LDM_PYTHON:-} ]]; then
  LDM_PYTHON=$repository/.venv/bin/python
  # One that was made inside a container is a link to nothing out here.
  [[ -x $LDM_PYTHON || (-n ${LDM_CONTAINER:-} && -L $LDM_PYTHON) ]] || LDM_PYTHON=python3
fi
export LDM_PYTHON

# Folders lie inside where they lie outside.
mounts=
for folder in "$SLURM_SUBMIT_DIR" "$repository" ${job_dir:+"$job_dir"}; do
  [[ ,$mounts, == *",$folder:$folder,"* ]] || mounts+=${mounts:+,}$folder:$folder
done
mounts+=${LDM_MOUNTS:+,$LDM_MOUNTS}
# What srun is told, and what stands before a command on a node.
srun_container=() in_container=()
if [[ ${LDM_CONTAINER:-} == *.sif ]]; then
  in_container=(apptainer exec --nv --bind "$mounts" "$LDM_CONTAINER")
elif [[ -n ${LDM_CONTAINER:-} ]]; then
  srun_container=(--container-image="$LDM_CONTAINER" --container-mounts="$mounts" --no-container-mount-home)
fi
