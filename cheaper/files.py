"""Files that a kill leaves whole: written in one step, or line by line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``content`` so that ``path`` holds either the old bytes or the new ones, also after a crash."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    publish(partial, path)


def publish(partial: Path, final: Path) -> None:
    """Flushes ``partial``, a file or a folder, to the disk and gives it its final name in one step."""
    for path in filter(Path.is_file, partial.rglob("*")) if partial.is_dir() else [partial]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(partial, final)
    folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in ``folder``, a file or a folder; unfinished ones have other names."""
    return max(Path(folder).glob("step-*"), default=None)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, without a last line that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def keep_until(path: Path, step: int) -> None:
    """Drops the records after ``step``: a run that resumes there makes them again."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
