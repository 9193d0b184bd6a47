#!/usr/bin/env bash
# Pre-training, phase 2, from the weights that run_phase1.sh left in runs/; training.checkpoint_path=… names others.
# Extra overrides are passed on: scripts/run_phase2.sh model=mobilellm_950m data.root=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/pretrain_phase2.yaml "$@"
