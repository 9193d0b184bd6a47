#!/usr/bin/env bash
# Mid-training by distillation, from the weights that run_phase2.sh left in runs/; training.checkpoint_path=… names others.
# Extra overrides are passed on: scripts/run_midtrain.sh model=mobilellm_950m data.root=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/midtrain.yaml "$@"
