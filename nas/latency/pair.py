"""Two text files that belong together and diff well: rows as CSV, and a JSON header with a checksum over both."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nas.errors import LatencyError
from nas.files import write_text


def write_pair(rows_path: Path, head_path: Path, rows: Iterable[Sequence[Any]], head: dict[str, Any]) -> None:
    """Writes both files, each atomically.

    The header goes last: a crash in between leaves a pair whose checksum does not fit, not a silent mixture.

    Args:
        rows: the first one names the columns.
        head: what JSON can hold.

    Raises:
        RunError: the folder cannot be written to.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(rows_path, text.getvalue())
    write_text(head_path, json.dumps({**head, "sha256": checksum(head, text.getvalue())}, indent=1) + "\n")


def read_pair(
    rows_path: Path, head_path: Path, *, what: str, again: str
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The rows, by column, and the header that `write_pair` wrote.

    Args:
        what: they are, for messages.
        again: what to do about it when they are not there or not whole, likewise.

    Raises:
        LatencyError: missing, damaged, or edited by hand.
    """
    try:
        text, head = rows_path.read_text(encoding="utf-8"), json.loads(head_path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise LatencyError(f"{e.filename}: there is no {what} here. {again}") from e
    except (OSError, ValueError) as e:
        raise LatencyError(f"{head_path}: this {what} is damaged: {e}. {again}") from e
    if not isinstance(head, dict) or head.pop("sha256", None) != checksum(head, text):
        raise LatencyError(
            f"{rows_path}: this {what} and its header {head_path.name} do not have the checksum that they were written "
            f"with: one of them was edited or damaged. What was measured is never edited. {again}"
        )
    return list(csv.DictReader(io.StringIO(text))), head


def checksum(head: dict[str, Any], text: str) -> str:
    """Of a header without its checksum, and the text of the rows."""
    return hashlib.sha256((json.dumps(head, sort_keys=True) + "\n" + text).encode()).hexdigest()
