#!/bin/bash
# One expert on two nodes of four GPUs: sbatch configs/clip_vit_b32/slurm/fit_multinode.sh sun397
# 8 GPUs x 16 images are the published batch of 128. All nodes see the pool's disk.
#SBATCH --job-name=clip-fit-nodes
#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=02:00:00
set -euo pipefail
task="${1:?give the task, such as sun397}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
srun lightning-merge fit --config configs/clip_vit_b32/suite.yaml --data.task "$task" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 4 --trainer.strategy ddp \
  --data.batch_size 16
