#!/usr/bin/env bash
# The recipe at the scale of a laptop: raw text, shards, all five stages. Every line is a command to try yourself.
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

[ -d data/sample/benchmarks ] || run cheaper sample
for recipe in phase1 general_sft reasoning_sft; do
    run cheaper convert yamls/quickstart/$recipe.yaml
done
run cheaper pipeline yamls/quickstart/pipeline.yaml # goes on where it was interrupted
run python scripts/quickstart_figures.py
run cheaper evaluate --model_path runs/quickstart-reasoning-sft --benchmarks sums --data_dir data/sample/benchmarks
[ -d runs/quickstart-hf ] || run cheaper export runs/quickstart-reasoning-sft --to hf --output runs/quickstart-hf
run cheaper report runs/quickstart-{teacher,phase1,phase2,without-teacher,midtrain,general-sft,reasoning-sft} \
    --output runs/quickstart.html

cat <<'NEXT'

What you have now
  data/sample                        the corpus, its tokenizer, and MDS shards, one folder per stream
  runs/quickstart.html               curves, samples, targets and configuration of all stages, for a browser
  runs/quickstart-hf                 the last model for transformers, with a model card
  runs/quickstart-<stage>            run.yaml, checkpoints, metrics.jsonl, samples.jsonl, summary.json

What to do next, after: . .venv/bin/activate
  cheaper chat runs/quickstart-hf                                             ask it for a sum
  cheaper inspect data/sample/chats-128/chats --tokenizer data/sample/tokenizer
                                                                              packed rows, loss in green
  cheaper pipeline yamls/quickstart/pipeline.yaml --dry-run                   the stages, their commands and states
  python scripts/train.py yamls/quickstart/midtrain.yaml training.distillation.kd_alpha=0.5 \
      training.checkpoint_path=runs/quickstart-phase2 run_name=mine           a variation of a stage
  cheaper pipeline model=mobilellm_140m --dry-run                             the real thing
NEXT
