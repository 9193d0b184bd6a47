"""What the quickstart's models have learned, as a table: held-out losses, and questions answered right."""

import json
from pathlib import Path

from cheaper.checkpoints import find_model, load_decoder
from cheaper.data.arithmetic import is_right
from cheaper.data.chat import ChatTemplate
from cheaper.data.tokenize import load_tokenizer
from cheaper.generation import greedy

STAGES = ("teacher", "phase1", "phase2", "without-teacher", "midtrain", "general-sft", "reasoning-sft")
TOKENIZER = "data/sample/tokenizer"
QUESTIONS = 100


def held_out_loss(stage: str) -> str:
    """Held-out losses as the run's summary has them."""
    found = json.loads(Path(f"runs/quickstart-{stage}/summary.json").read_text())["held_out"]
    losses = {name.split("/")[1]: value for name, value in found.items() if name.endswith("/loss")}
    return ", ".join(f"{name.removeprefix('held_out_')} {value:.3f}" for name, value in losses.items())


def answered(stage: str, kind: str) -> float:
    """Share of held-out questions that the stage's model answers right in the chat format."""
    tokenizer = load_tokenizer(TOKENIZER)
    template = ChatTemplate.load("llama3", TOKENIZER, tokenizer)
    rows = [json.loads(line) for line in Path(f"data/sample/raw/held_out_{kind}.jsonl").read_text().splitlines()]
    prompts = [template.prompt(row["messages"][:1]).tolist() for row in rows[:QUESTIONS]]
    decoder = load_decoder(find_model(f"runs/quickstart-{stage}", "run"))
    answers = greedy(decoder, prompts, 100, [tokenizer.eos_id, template.end_of_turn_id])
    right = [is_right(tokenizer.decode(ids), row["answer"]) for ids, row in zip(answers, rows, strict=False)]
    return sum(right) / len(right)


if __name__ == "__main__":
    print(f"\n{'stage':<18}{'3 numbers':>10}{'5 numbers':>11}   held-out loss")
    for stage in STAGES:
        chats = stage in ("midtrain", "general-sft", "reasoning-sft")
        shares = [f"{answered(stage, kind):.0%}" if chats else "" for kind in ("chats", "long_chats")]
        print(f"{stage:<18}{shares[0]:>10}{shares[1]:>11}   {held_out_loss(stage)}", flush=True)
