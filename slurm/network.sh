# Collective communication: defaults that suit most clusters, each one overridable from the environment
# of sbatch (which SLURM hands on). Sourced by train_ldm.sh on the first node of the allocation.
# shellcheck shell=bash

# Which interface carries the bootstrap (not the data, on InfiniBand or EFA). ^ means all but these.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}
# WARN is silent; INFO names the transport of every channel, worth reading once per cluster.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

shopt -s nullglob
efa=(/sys/class/infiniband/rdmap* /sys/class/infiniband/efa*)
infiniband=(/sys/class/infiniband/mlx*)
shopt -u nullglob
if ((${#efa[@]})); then
  # AWS p4d/p5: libfabric over EFA, through the aws-ofi-nccl plugin that must be in the image or AMI.
  export FI_PROVIDER=${FI_PROVIDER:-efa}
  export FI_EFA_USE_DEVICE_RDMA=${FI_EFA_USE_DEVICE_RDMA:-1} # GPUDirect RDMA on p4d; newer libfabric decides itself
  export FI_EFA_FORK_SAFE=${FI_EFA_FORK_SAFE:-1}             # data loaders fork
elif ((${#infiniband[@]})); then
  # Survive a link flap of some 20 s instead of aborting: 4 us * 2^22 per try, 7 tries.
  export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}
  export NCCL_IB_RETRY_CNT=${NCCL_IB_RETRY_CNT:-7}
  # Name the adapters when storage has its own: NCCL_IB_HCA=mlx5_0,mlx5_1,...
fi
