#!/usr/bin/env bash
# Trains on one or two nodes, each a job of its own: slurm requeues a lost one alone, the other one trains on.
#     sbatch -p debug elastic.sh train --data /shared/prepared --output /shared/run
# For N nodes: --array=0-(N-1), --nnodes 1:N; with GPUs: --gpus-per-node and --nproc_per_node.
#SBATCH --array=0-1 --nodes=1 --exclusive --requeue --open-mode=append --output=slurm-%A-%a.out
set -euo pipefail

# All meet on the node of the first job.
until host=$(squeue --noheader --states=R --jobs="${SLURM_ARRAY_JOB_ID}_0" --format=%N) && [ -n "$host" ]; do sleep 5; done
[ "$SLURM_ARRAY_TASK_ID" = 0 ] && is_host=true || is_host=false
exec srun python -m torchrec_deepfm.launch --nnodes 1:2 --nproc_per_node 1 --max_restarts 10 \
  --rdzv_backend c10d --rdzv_endpoint "$host:29500" --rdzv_conf "is_host=$is_host" \
  --rdzv_id "$SLURM_ARRAY_JOB_ID" -m torchrec_deepfm "$@"
