"""What a person sees of a folder of shards."""

from pathlib import Path

import numpy as np
import pytest
from streaming import MDSWriter

from cheaper.data.inspect import BORDER, LINE, LOSS, NO_LOSS, RESET, inspect_rows
from cheaper.data.tokenize import Tokenizer, load_tokenizer
from cheaper.errors import UserError
from tests.conftest import some_texts, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(str(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), some_texts(50, seed=0))))


def write_rows(folder: Path, rows: list[dict[str, list[int]]], **limits: int) -> Path:
    dtypes = {"input_ids": "uint16", "lengths": "uint8", "loss_lengths": "uint8"}
    columns = {name: f"ndarray:{dtypes[name]}" for name in rows[0]}
    with MDSWriter(out=str(folder), columns=columns, **limits) as writer:
        for row in rows:
            writer.write({name: np.array(values, dtypes[name]) for name, values in row.items()})
    return folder


def row_of(tokenizer: Tokenizer, documents: list[list[tuple[str, bool]]], loss: bool = True) -> dict[str, list[int]]:
    """A row of documents made of pieces with and without loss, each ended by EOS."""
    ids, lengths, runs = [], [], [0]
    for document in documents:
        before = len(ids)
        for text, has_loss in document:
            piece = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
            if has_loss != (len(runs) % 2 == 0):
                runs.append(0)
            runs[-1] += len(piece)
            ids += piece
        lengths.append(len(ids) - before)
    return {"input_ids": ids, "lengths": lengths, **({"loss_lengths": runs} if loss else {})}


CHATS = [[("a row", False), ("reads", True)], [("tokens", True), ("of\n\nmany", False)], [("texts", False)]]


def test_loss_and_borders_without_colour(tokenizer, tmp_path):
    row = row_of(tokenizer, CHATS)
    [shown] = inspect_rows(write_rows(tmp_path, [row]), tokenizer, 0, 5, colour=False)
    about, text = shown.split("\n", 1)
    with_loss = len(tokenizer.encode("reads")) + len(tokenizer.encode("tokens")) + 2
    assert about == f"row 0: {len(row['input_ids'])} tokens, {with_loss} with loss, 3 documents"
    assert text == (f"a row</s>⟦reads</s>⟧\n{BORDER}\n⟦tokens</s>⟧of\n\nmany</s>\n{BORDER}\ntexts</s>")


def test_loss_and_borders_in_colour(tokenizer, tmp_path):
    folder = write_rows(tmp_path, [row_of(tokenizer, CHATS[:2])])
    [shown] = inspect_rows(folder, tokenizer, 0, 1, colour=True)
    assert shown.split("\n", 1)[1] == (
        f"{NO_LOSS}a row</s>{RESET}{LOSS}reads</s>{RESET}\n{LINE}{BORDER}{RESET}\n"
        f"{LOSS}tokens</s>{RESET}{NO_LOSS}of\n\nmany</s>{RESET}"
    )


def test_rows_without_runs_have_loss_everywhere(tokenizer, tmp_path):
    folder = write_rows(tmp_path, [row_of(tokenizer, CHATS[1:], loss=False)])
    [shown] = inspect_rows(folder, tokenizer, 0, 1, colour=False)
    assert shown.split("\n", 1)[1] == f"⟦tokens</s>of\n\nmany</s>⟧\n{BORDER}\n⟦texts</s>⟧"


def test_which_rows(tokenizer, tmp_path):
    texts = [f"{i} tokens" for i in range(50)]
    rows = [row_of(tokenizer, [[(text, True)]], loss=False) for text in texts]
    folder = write_rows(tmp_path, rows, size_limit=400)  # several shards
    assert len(list(folder.glob("*.mds"))) > 2
    shown = list(inspect_rows(folder, tokenizer, 7, 30, colour=False))
    assert [text.split("\n")[1] for text in shown] == [f"⟦{text}</s>⟧" for text in texts[7:37]]
    assert len(list(inspect_rows(folder, tokenizer, 45, 30, colour=False))) == 5


def test_what_a_terminal_would_obey_is_escaped(tokenizer, tmp_path):
    text = "a\x1b[2Jb\rc\x00d\x7fe\x9bf\u202eg\ttab\nline ⟦漢字⟧ 👩\u200d👧"
    folder = write_rows(tmp_path, [row_of(tokenizer, [[(text, False)]])])
    [shown] = inspect_rows(folder, tokenizer, 0, 1, colour=False)
    expected = "a\\x1b[2Jb\\rc\\x00d\\x7fe\\x9bf\\u202eg\ttab\nline ⟦漢字⟧ 👩\u200d👧</s>"
    assert shown.split("\n", 1)[1] == expected


def test_a_character_cut_in_two_is_shown_as_replaced(tokenizer, tmp_path):
    ids = tokenizer.encode("漢").tolist()
    folder = write_rows(tmp_path, [{"input_ids": ids[:-1], "lengths": [len(ids) - 1]}])
    [shown] = inspect_rows(folder, tokenizer, 0, 1, colour=False)
    assert shown.split("\n", 1)[1].strip("⟦⟧�") == ""
    assert "�" in shown


def test_shards_that_training_made_are_shown(corpus):
    folder = corpus.folder / "mds" / "a"
    tokenizer = load_tokenizer(str(corpus.folder / "tokenizer"))
    [shown] = inspect_rows(folder, tokenizer, 0, 1, colour=False)
    assert shown.startswith("row 0: 32 tokens, 32 with loss, ")
    assert shown.split("\n")[1].startswith("⟦<s>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 5000], "lengths": [2]}, "row 0 has token 5000, tokenizer .* has 320 words"),
        ({"input_ids": [1, 5], "lengths": [1]}, "lengths of row 0 do not add up to its 2 tokens"),
        ({"input_ids": [1, 5], "lengths": [2], "loss_lengths": [1]}, "loss_lengths of row 0 do not add up"),
        ({"lengths": [2]}, "holds no rows of tokens; its columns are lengths"),
    ],
)
def test_rows_of_something_else(tokenizer, tmp_path, row, message):
    folder = write_rows(tmp_path, [row])
    with pytest.raises(UserError, match=message):
        list(inspect_rows(folder, tokenizer, 0, 1, colour=False))


def test_folders_of_something_else(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"holds no index\.json"):  # at once, not with the first row
        inspect_rows(tmp_path, tokenizer, 0, 1, colour=False)
    for content in ("{", "[]", '{"version": 1}', '{"version": 2, "shards": [{}]}'):
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(UserError, match="is no index of MDS shards") as error:
            inspect_rows(tmp_path, tokenizer, 0, 1, colour=False)
        assert "\n" not in str(error.value)
    folder = write_rows(tmp_path / "rows", [row_of(tokenizer, CHATS)])
    for first in (-1, 1):
        with pytest.raises(UserError, match=f"has 1 rows, numbered from 0; there is no row {first}"):
            inspect_rows(folder, tokenizer, first, 1, colour=False)
    next(folder.glob("*.mds")).unlink()
    with pytest.raises(UserError, match="row 0 cannot be read"):
        list(inspect_rows(folder, tokenizer, 0, 1, colour=False))


def test_a_pickled_column_is_refused(tokenizer, tmp_path):
    with MDSWriter(out=str(tmp_path), columns={"input_ids": "pkl"}) as writer:
        writer.write({"input_ids": [1, 2]})
    with pytest.raises(UserError, match="unsafe type"):
        inspect_rows(tmp_path, tokenizer, 0, 1, colour=False)
