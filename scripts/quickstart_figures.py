"""What the quickstart's models have learned, as a table: questions answered right, and held-out losses."""

import json
from pathlib import Path

from cheaper.checkpoints import find_model, load_decoder
from cheaper.data.arithmetic import is_right
from cheaper.data.chat import ChatTemplate
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.files import read_records
from cheaper.generation import Sampling, continuations

PRE_TRAINING = ("teacher", "phase1", "phase2", "without-teacher", "midtrain")
CHATS = ("midtrain", "general-sft", "reasoning-sft")
TOKENIZER = "data/sample/tokenizer"


def held_out_loss(stage: str) -> str:
    """Held-out losses as the run's summary has them."""
    found = json.loads(Path(f"runs/quickstart-{stage}/summary.json").read_text())["held_out"]
    losses = {name.split("/")[1]: value for name, value in found.items() if name.endswith("/loss")}
    return ", ".join(f"{name.removeprefix('held_out_')} {value:.3f}" for name, value in losses.items())


def prompts(rows: list[dict], tokenizer: Tokenizer, template: ChatTemplate, as_chat: bool) -> list[list[int]]:
    """The questions of the rows, as the beginning of a text or as a chat to answer."""
    if as_chat:
        return [template.prompt(row["messages"][:1]).tolist() for row in rows]
    texts = [f"Question: {row['messages'][0]['content']}\nAnswer:" for row in rows]
    return [[tokenizer.bos_id, *tokenizer.encode(text).tolist()] for text in texts]


def main() -> None:
    """Prints a line for each stage."""
    tokenizer = load_tokenizer(TOKENIZER)
    template = ChatTemplate.load("llama3", TOKENIZER, tokenizer)
    stop_ids = [tokenizer.eos_id, template.end_of_turn_id]
    print(f"\n{'':<16}{'held-out questions answered right':^38}\n{'':<16}{'as text':>12}{'in a chat':>18}")
    print(f"{'stage':<16}{'3 numbers':>12}{'3 numbers':>12}{'5 numbers':>12}   held-out loss")
    for stage in dict.fromkeys((*PRE_TRAINING, *CHATS)):
        decoder = load_decoder(find_model(f"runs/quickstart-{stage}", "run"))
        line = f"{stage:<16}"
        for asked, kind, as_chat in (
            (PRE_TRAINING, "chats", False),
            (CHATS, "chats", True),
            (CHATS, "long_chats", True),
        ):
            rows = read_records(Path(f"data/sample/raw/held_out_{kind}.jsonl"))
            share = ""
            if stage in asked:
                answers = continuations(
                    decoder, prompts(rows, tokenizer, template, as_chat), Sampling(64, stop_ids=stop_ids)
                )
                right = [is_right(tokenizer.decode(ids), row["answer"]) for ids, row in zip(answers, rows, strict=True)]
                share = f"{sum(right) / len(right):.0%}"
            line += f"{share:>12}"
        print(f"{line}   {held_out_loss(stage)}", flush=True)


if __name__ == "__main__":
    main()
