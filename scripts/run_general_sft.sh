#!/usr/bin/env bash
# Post-training, general SFT. Extra overrides are passed on: scripts/run_general_sft.sh model=mobilellm_950m training.checkpoint_path=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/posttrain_general_sft.yaml "$@"
