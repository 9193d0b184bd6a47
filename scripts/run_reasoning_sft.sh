#!/usr/bin/env bash
# Post-training, reasoning SFT, from the weights that run_general_sft.sh left in runs/; training.checkpoint_path=… names others.
# Extra overrides are passed on: scripts/run_reasoning_sft.sh model=mobilellm_950m data.root=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/posttrain_reasoning_sft.yaml "$@"
