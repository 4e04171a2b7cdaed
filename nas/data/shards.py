"""Data sets in a few large files, each of one split, as Hugging Face and TensorFlow Datasets write them."""

import re
from pathlib import Path

from nas.errors import DataError

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT = re.compile(rf"(?:^|-)({'|'.join(SPLITS)})(?=[-_.])")  # a word at the beginning, or after a dash
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def by_split(path: Path, pattern: re.Pattern[str]) -> dict[str, list[Path]]:
    """The files that make up "train", "val" and "test", sorted by name; all are "train" if none says what it is.

    Args:
        path: one file, or a folder with them, or with a folder `data` that has them.
        pattern: what the names of such files match.

    Raises:
        DataError: no file, a shard missing, or a file of which the name does not say to what it belongs.
    """
    files = find(path, pattern)
    if not files:
        raise DataError(
            f"{path}: no file in it whose name matches {pattern.pattern}. Point data.source at one such file or at "
            "the folder that has them."
        )
    split_of = {file: match[1] for file in files if (match := _SPLIT.search(file.name.lower()))}
    if not split_of or files == [path]:
        split_of = dict.fromkeys(files, "train")
    if unclear := [file for file in files if file not in split_of]:
        raise DataError(
            f"{unclear[0]}: its name does not say to which split it belongs, as {next(iter(split_of)).name} does. "
            f"Begin it with train-, validation- or test-, or move it away."
        )
    splits: dict[str, list[Path]] = {}
    for file, name in split_of.items():
        splits.setdefault(SPLITS[name], []).append(file)
    if "train" not in splits:
        raise DataError(
            f"{path}: only files of {' and '.join(splits)}, none of train. Without training images nothing can be "
            "trained: add them."
        )
    if files != [path]:
        _check_shards(files)
    return {name: splits[name] for name in ("train", "val", "test") if name in splits}


def find(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Files by that pattern: `path` itself, or what is in it, or in its folder `data`; sorted by name."""
    if path.is_file():
        return [path] if pattern.search(path.name.lower()) else []
    for folder in (path, path / "data"):
        entries = folder.iterdir() if folder.is_dir() else ()
        files = sorted(f for f in entries if pattern.search(f.name.lower()) and not f.name.startswith("."))
        if files:
            return files
    return []


def _check_shards(files: list[Path]) -> None:
    """A set whose names count its shards must have all of them."""
    there: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.name):
            key = file.name[: match.start()], int(match[2])
            there.setdefault(key, set()).add(int(match[1]))
    for (name, count), numbers in there.items():
        if missing := sorted(set(range(count)) - numbers):
            raise DataError(
                f"{files[0].parent}: {name}-{missing[0]:05d}-of-{count:05d} is missing"
                f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}. All {count} shards make up the set: "
                "download them again."
            )
