#!/bin/bash
# Eight experts at a time, one GPU each: sbatch configs/clip_vit_b32/slurm/fit_array.sh
#SBATCH --job-name=clip-fit
#SBATCH --array=0-7
#SBATCH --nodes=1 --ntasks=1 --gpus-per-task=1 --cpus-per-task=8 --time=02:00:00
set -euo pipefail
tasks=(sun397 cars resisc45 eurosat svhn gtsrb mnist dtd)
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" # heads.sh has filled the cache
srun lightning-merge fit --config configs/clip_vit_b32/suite.yaml \
  --data.task "${tasks[$SLURM_ARRAY_TASK_ID]}" --trainer.devices 1 "$@"
