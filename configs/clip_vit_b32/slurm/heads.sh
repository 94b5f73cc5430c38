#!/bin/bash
# Once, where there is a network: the zero-shot heads, the data sets and timm's weights.
#SBATCH --job-name=clip-heads
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8 --time=02:00:00
set -euo pipefail
python -m lightning_merge.zero_shot --suite configs/clip_vit_b32/suite.yaml \
  --prompts configs/clip_vit_b32/prompts.yaml --output runs/clip_vit_b32/heads
python -c "import timm; timm.create_model('vit_base_patch32_clip_quickgelu_224.openai', pretrained=True)"
