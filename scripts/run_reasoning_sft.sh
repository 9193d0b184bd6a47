#!/usr/bin/env bash
# Post-training, reasoning SFT. Extra overrides are passed on: scripts/run_reasoning_sft.sh model=mobilellm_950m training.checkpoint_path=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/posttrain_reasoning_sft.yaml "$@"
