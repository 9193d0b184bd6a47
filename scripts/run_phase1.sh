#!/usr/bin/env bash
# Pre-training, phase 1. Extra overrides are passed on: scripts/run_phase1.sh model=mobilellm_950m data.root=…
set -euo pipefail
cd "$(dirname "$0")/.."
exec composer scripts/train.py yamls/pretrain_phase1.yaml "$@"
