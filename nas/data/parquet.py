"""Images in Parquet files, as Hugging Face's `datasets` writes them."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.config import Data
from nas.data.cache import cached, damaged, fingerprint, stamp
from nas.data.decode import header
from nas.data.lazy import Ranges, Records, require
from nas.data.shards import by_split
from nas.data.splits import Splits, encoded_splits
from nas.errors import DataError

NAMES = re.compile(r"\.parquet$")
IMAGE = ("image", "img", "images", "picture")  # names of columns, the likeliest first
LABEL = ("label", "labels", "fine_label", "class", "target")
ROWS = 256  # at a time while rewriting
VERSION = "1"  # of what `_rewrite` makes


def parquet(path: Path, config: Data) -> Splits:
    """A .parquet file or a folder of them (train-*, validation-*, test-*) with columns of image files and labels.

    The image column holds bytes, or structs with a field `bytes`, of PNG, JPEG or the like; labels are class numbers,
    named by the Hugging Face metadata if there, or strings. A row of Parquet is expensive to reach, since it is
    compressed with its neighbours: the two columns are rewritten once, as they are, into an uncompressed Arrow file in
    the cache folder, and that is mapped into memory.

    Raises:
        DataError: no such columns, a missing or damaged image, a truncated file, pyarrow not installed.
    """
    require("pyarrow", "pyarrow", "reading Parquet")
    splits = by_split(path, NAMES)
    files = [file for part in splits.values() for file in part]
    tables = [_opened(file) for file in files]
    image, label, class_names = _columns(files[0], tables[0].schema_arrow)
    for file, table in zip(files, tables, strict=True):
        if missing := {image, label} - set(table.schema_arrow.names):
            raise DataError(
                f"{file}: no column {missing.pop()!r}, as {files[0].name} has; its columns are "
                f"{', '.join(table.schema_arrow.names)}. All files of a set need the same columns: write it again."
            )
    lengths = {file: table.metadata.num_rows for file, table in zip(files, tables, strict=True)}
    ranges = Ranges(list(lengths.values()))

    def name(row: int) -> str:
        file, at = ranges.find(row)
        return f"{files[file]}, row {at}"

    made = cached(
        f"{stamp(files, VERSION, image, label)}.arrow",
        lambda target: _rewrite(target, files, tables, image, label),
    )
    read, labels, sizes = _mapped(made)
    records = Records(read, name, sizes, fingerprint(path if path.is_dir() else path.parent, files))
    counts = {what: sum(lengths[file] for file in part) for what, part in splits.items()}
    return encoded_splits(records, labels, counts, config, class_names)


def _opened(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as e:
        if getattr(e, "errno", None) is not None:  # the disk's or the permission's fault, not the file's
            raise
        raise _damaged(file, e) from e


def _columns(file: Path, schema: Any) -> tuple[str, str, tuple[str, ...] | None]:
    """The names of the image and the label column, and of the classes where the metadata have them."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):  # written by something else
        features, kinds = {}, {}

    def pick(kind: str, likely: Sequence[str]) -> str:
        typed = [name for name in schema.names if kinds.get(name) == kind]
        named = [name for name in likely if name in schema.names]
        found = [name for name in named if name in typed] or (typed if len(typed) == 1 else named)
        if not found:
            raise DataError(
                f"{file}: no column of {'images' if likely is IMAGE else 'labels'}: its columns are "
                f"{', '.join(schema.names) or 'none'}. One of them must be called {', '.join(likely[:-1])} or "
                f"{likely[-1]}: rename it."
            )
        return found[0]

    image, label = pick("Image", IMAGE), pick("ClassLabel", LABEL)
    names = features.get(label, {}).get("names") if kinds.get(label) == "ClassLabel" else None
    return image, label, tuple(map(str, names)) if names else None


def _rewrite(target: Path, files: Sequence[Path], tables: Sequence[Any], image: str, label: str) -> None:
    """Writes image, label, height, width and channels of all rows as an Arrow IPC file."""
    import pyarrow as pa

    kinds = {_label_type(table.schema_arrow.field(label).type): file for file, table in zip(files, tables, strict=True)}
    if len(kinds) > 1:
        found = " but ".join(f"{kind} in {file.name}" for kind, file in kinds.items())
        raise DataError(f"{files[0].parent}: column {label!r} is {found}. Labels must be of one type: write it again.")
    kind = next(iter(kinds))
    sizes = [(key, pa.int32()) for key in ("height", "width", "channels")]
    schema = pa.schema([("image", pa.large_binary()), ("label", kind), *sizes])
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for file, table in zip(files, tables, strict=True):
            row = 0
            for batch in _batches(file, table, image, label):
                encoded = _bytes(batch.column(image), file, row)
                labels = batch.column(label).cast(kind)
                if labels.null_count:
                    at = row + labels.is_null().to_pylist().index(True)
                    raise DataError(
                        f"{file}, row {at}: no {label}. Every image needs a label: add it, or drop the row."
                    )
                shapes = [header(memoryview(x.as_buffer()), f"{file}, row {row + i}") for i, x in enumerate(encoded)]
                columns = [pa.array(column, pa.int32()) for column in zip(*shapes, strict=True)]
                writer.write_batch(pa.record_batch([encoded, labels, *columns], schema=schema))
                row += len(batch)


def _label_type(kind: Any) -> Any:
    """What a column of labels is rewritten to: all integers and all strings alike, anything else is refused later."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_integer(kind):
        return pa.int64()
    strings = types.is_dictionary(kind) or types.is_string(kind) or types.is_large_string(kind)
    return pa.string() if strings else kind


def _batches(file: Path, table: Any, image: str, label: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from (b for b in table.iter_batches(batch_size=ROWS, columns=[image, label]) if len(b))
    except (pa.ArrowException, OSError) as e:
        if getattr(e, "errno", None) is not None:  # the disk's or the permission's fault, not the file's
            raise
        raise _damaged(file, e) from e


def _bytes(column: Any, file: Path, row: int) -> Any:
    """The images as large_binary, from a column of bytes or of structs that begins at `row` of `file`."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"{file}: its images are {kind}. They must be the bytes of image files, or structs with a field `bytes`: "
            "write them so (Hugging Face's `datasets` does for an Image feature)."
        )
    if column.null_count:
        at = row + column.is_null().to_pylist().index(True)
        raise DataError(
            f"{file}, row {at}: no image bytes in it. The images must be in the file itself, not be paths to others: "
            "write it again with the images embedded."
        )
    return column.cast(pa.large_binary())


def _mapped(file: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """(function that reads images, labels, sizes) of a file that `_rewrite` wrote; the images stay on disk."""
    import pyarrow as pa

    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except pa.ArrowInvalid as e:
        raise damaged(file, e) from e
    chunks = table.column("image").chunks
    ranges = Ranges([len(chunk) for chunk in chunks])

    def read(rows: Sequence[int]) -> Iterator[memoryview]:
        for chunk, at in map(ranges.find, rows):
            yield memoryview(chunks[chunk][at].as_buffer())

    sizes = np.stack([table.column(key).to_numpy() for key in ("height", "width", "channels")], 1)
    labels = table.column("label").to_numpy()
    return read, labels.astype(str) if labels.dtype == object else labels, sizes


def _damaged(file: Path, error: Exception) -> DataError:
    why = " ".join(str(error).split())
    return DataError(f"{file}: cannot be read as Parquet ({why}): truncated or damaged. Download or write it again.")
