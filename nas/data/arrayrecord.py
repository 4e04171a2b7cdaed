"""Images in ArrayRecord files of tf.train.Example messages, as TensorFlow Datasets writes them, without TensorFlow."""

import functools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.config import Data
from nas.data.cache import cached, damaged, fingerprint, stamp
from nas.data.decode import header
from nas.data.lazy import Ranges, Records, in_threads, require
from nas.data.shards import by_split
from nas.data.splits import Splits, encoded_splits
from nas.errors import DataError

NAMES = re.compile(r"\.array_?record(-\d{5}-of-\d{5})?$")
IMAGE = ("image", "image/encoded")  # keys of the features, the likeliest first
LABEL = ("label", "image/class/label")
CLASS_NAMES = "label.labels.txt"  # beside the files, one class a line
RECORDS = 256  # at a time while indexing
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
VERSION = "1"  # of the index


def arrayrecord(path: Path, config: Data) -> Splits:
    """A .array_record file or a folder of them (*-train.*, *-validation.*, *-test.*) of TensorFlow's tf.train.Example.

    An Example has an image file's bytes under `image` or `image/encoded`, and a class number or a string under
    `label` or `image/class/label`; label.labels.txt beside the files names the classes. All records are read once for
    their labels and sizes, which are kept in the cache folder.

    Raises:
        DataError: a missing key, a damaged image or record, a truncated file, array_record not installed.
    """
    require("array_record", "array-record", "reading ArrayRecord")
    splits = by_split(path, NAMES)
    files = [file for part in splits.values() for file in part]
    readers = [_opened(file) for file in files]
    counts = [reader.num_records() for reader in readers]
    ranges = Ranges(counts)

    def name(row: int) -> str:
        file, at = ranges.find(row)
        return f"{files[file]}, record {at}"

    def read(rows: Sequence[int]) -> list[bytes]:
        found = [ranges.find(row) for row in rows]
        records: dict[int, bytes] = {}
        for file in {file for file, _ in found}:  # all of a file at once: ten times faster than one by one
            own = [i for i, (other, _) in enumerate(found) if other == file]
            records |= zip(own, _records(readers[file], [found[i][1] for i in own], files[file]), strict=True)
        return [_image(records[i], name(row)) for i, row in enumerate(rows)]

    made = cached(
        f"{stamp(files, VERSION)}.npz", lambda target: _index(target, files, readers, counts, threads=config.threads)
    )
    try:
        with np.load(made) as index:
            labels, sizes = index["labels"], index["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise damaged(made, e) from e
    folder = path if path.is_dir() else path.parent
    records = Records(read, name, sizes, fingerprint(folder, files))
    length = dict(zip(files, counts, strict=True))
    lengths = {what: sum(length[file] for file in part) for what, part in splits.items()}
    return encoded_splits(records, labels, lengths, config, _class_names(files[0].parent / CLASS_NAMES))


def _opened(file: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    file.open("rb").close()  # a missing file or permission is an OSError
    reader = ArrayRecordReader(str(file), RANDOM_ACCESS, file_reader_buffer_size=32_768)
    if not reader.ok():
        try:
            reader.read([0])  # says what is wrong
            why = "unknown reason"
        except Exception as e:
            why = " ".join(str(e).split())
        raise DataError(
            f"{file}: cannot be read as ArrayRecord ({why}): truncated, damaged or another format. Download or write "
            "it again."
        )
    return reader


def _records(reader: Any, rows: Sequence[int], file: Path) -> list[bytes]:
    try:
        return reader.read(list(rows))
    except Exception as e:  # whatever the C++ side raises
        if len(rows) > 1:
            return [record for row in rows for record in _records(reader, [row], file)]  # to name the one
        why = " ".join(str(e).split())
        raise DataError(
            f"{file}, record {rows[0]}: cannot be read ({why}): damaged. Download or write the file again."
        ) from e


def _index(target: Path, files: Sequence[Path], readers: Sequence[Any], counts: Sequence[int], *, threads: int) -> None:
    """Writes labels [n] and sizes [n, 3] of all records as .npz."""

    def look(chunk: tuple[int, int]) -> list[tuple[int | str, tuple[int, int, int]]]:
        file, start = chunk
        rows = range(start, min(start + RECORDS, counts[file]))
        names = [f"{files[file]}, record {row}" for row in rows]
        found = _records(readers[file], rows, files[file])
        return [(_label(x, name), header(_image(x, name), name)) for x, name in zip(found, names, strict=True)]

    chunks = [(file, start) for file, count in enumerate(counts) for start in range(0, count, RECORDS)]
    seen = [pair for chunk in in_threads(look, chunks, threads) for pair in chunk]
    if len({type(label) for label, _ in seen}) > 1:
        raise DataError(f"{files[0].parent}: labels are strings in one record and numbers in another. Write one kind.")
    labels = np.array([label for label, _ in seen])
    sizes = np.array([size for _, size in seen], np.int32).reshape(-1, 3)
    with target.open("wb") as file:
        np.savez(file, labels=labels, sizes=sizes)


def _image(record: bytes, name: str) -> bytes:
    values = _feature(record, IMAGE, name).bytes_list.value
    if len(values) != 1:
        raise DataError(
            f"{name}: {len(values)} byte strings under its image key. It must be one, an encoded image: write the "
            "file again."
        )
    return values[0]


def _label(record: bytes, name: str) -> int | str:
    feature = _feature(record, LABEL, name)
    values = feature.int64_list.value or feature.bytes_list.value
    if len(values) != 1:
        raise DataError(
            f"{name}: {len(values)} integers or strings under its label key. It must be one, the image's class: write "
            "the file again."
        )
    return values[0].decode(errors="replace") if isinstance(values[0], bytes) else int(values[0])


def _feature(record: bytes, keys: Sequence[str], name: str) -> Any:
    from google.protobuf.message import DecodeError

    try:
        features = _example().FromString(record).features.feature
    except DecodeError as e:
        raise DataError(
            f"{name}: not a tf.train.Example ({e}). Each record must be one, with an image and a label: write the file "
            "so, as TensorFlow Datasets does."
        ) from e
    key = next((key for key in keys if key in features), None)
    if key is None:
        raise DataError(
            f"{name}: no feature {' or '.join(keys)}; it has {', '.join(sorted(features)) or 'none'}. Rename it in the "
            "files."
        )
    return features[key]


@functools.cache
def _example() -> Any:
    """The class of tf.train.Example messages, after tensorflow/core/example/{example,feature}.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str | None, bool], into: Any = file.message_type) -> Any:
        made = into.add(name=name)
        for key, number, kind, of, repeated in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            made.field.add(name=key, number=number, type=kind, type_name=of and f".tensorflow.{of}", label=label)
        return made

    message("BytesList", ("value", 1, field.TYPE_BYTES, None, True))
    message("FloatList", ("value", 1, field.TYPE_FLOAT, None, True))
    message("Int64List", ("value", 1, field.TYPE_INT64, None, True))
    feature = message(
        "Feature",
        ("bytes_list", 1, field.TYPE_MESSAGE, "BytesList", False),
        ("float_list", 2, field.TYPE_MESSAGE, "FloatList", False),
        ("int64_list", 3, field.TYPE_MESSAGE, "Int64List", False),
    )
    feature.oneof_decl.add(name="kind")
    for of_kind in feature.field:
        of_kind.oneof_index = 0
    features = message("Features", ("feature", 1, field.TYPE_MESSAGE, "Features.FeatureEntry", True))
    entry = message(
        "FeatureEntry",
        ("key", 1, field.TYPE_STRING, None, False),
        ("value", 2, field.TYPE_MESSAGE, "Feature", False),
        into=features.nested_type,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, field.TYPE_MESSAGE, "Features", False))
    pool = descriptor_pool.DescriptorPool()  # of its own: TensorFlow may be in the process too
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _class_names(file: Path) -> tuple[str, ...] | None:
    if not file.exists():
        return None
    return tuple(
        line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    )
