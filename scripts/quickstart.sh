#!/usr/bin/env bash
# The recipe at the scale of a laptop: raw text, shards, phase 1, phase 2. Every line is a command to try yourself.
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

train() { # a run that was interrupted goes on; one that has finished says so
    local resume=()
    compgen -G "runs/$1/step-*.pt" >/dev/null && resume=(training.resume=true)
    run python scripts/train.py "yamls/${1//-/_}.yaml" "${resume[@]}"
}

[ -d data/sample/tokenizer ] || run cheaper sample
run cheaper convert yamls/quickstart_phase1.yaml
train quickstart-phase1
train quickstart-phase2

cat <<'NEXT'

What you have now
  data/sample/mds-256          the corpus as MDS shards, one folder per stream
  runs/quickstart-phase1       run.yaml, checkpoints, metrics.jsonl, samples.jsonl, summary.json
  runs/quickstart-phase2       the same, started from the weights of phase 1

What to do next
  tail -n 3 runs/quickstart-phase2/samples.jsonl                      what the model writes
  python scripts/train.py yamls/quickstart_phase1.yaml --dry-run      the whole run, resolved and checked
  python scripts/train.py yamls/quickstart_phase2.yaml training.stage.learning_rate=1e-3 run_name=mine
  cheaper convert data=pretrain_phase1_mix                            the published mixture (needs the hub)
NEXT
