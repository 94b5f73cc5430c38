#!/bin/bash
# Every method, merged and swept on eight GPUs of two nodes, after fit_array.sh:
#   sbatch --dependency=afterok:JOB configs/clip_vit_b32/slurm/merge_sweep.sh
#SBATCH --job-name=clip-merge
#SBATCH --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --time=04:00:00
set -euo pipefail
folder=configs/clip_vit_b32
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
for method in task_arithmetic ties tsv adamerging adamerging_plus_plus ours; do
  for stage in merge sweep; do
    srun lightning-merge "$stage" --config "$folder/suite.yaml" \
      --config "$folder/methods/$method.yaml" \
      --trainer.num_nodes "$SLURM_NNODES" --trainer.devices 4 --trainer.strategy ddp
  done
done
