#!/usr/bin/env bash
# Mid-training by distillation. Extra overrides are passed on: scripts/run_midtrain.sh model=mobilellm_950m training.checkpoint_path=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/midtrain.yaml "$@"
