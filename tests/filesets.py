"""Small data sets of encoded images, in the formats that can stay in files. Not a test: other tests import it."""

import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nas.data import LazyImages, Part


def pictures(n: int, classes: int, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images [n, *shape], all different, and labels that use every class."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, np.arange(n) % classes


def png(image: np.ndarray) -> bytes:
    """The image as the bytes of a PNG file, which keeps every pixel."""
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).save(out, "PNG")
    return out.getvalue()


def write_folder(path: Path, images: Sequence[np.ndarray], labels: Sequence[int]) -> Path:
    """Class folders c0, c1, ... of PNG files."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = path / f"c{label}" / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(image))
    return path


def write_parquet(
    file: Path,
    encoded: Sequence[Any],
    labels: Sequence[Any],
    *,
    names: Sequence[str] = (),
    columns: str = "image label",
) -> Path:
    """As `datasets` writes it: structs of bytes and path, and class names in the metadata if given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image, label = columns.split()
    structs = pa.array(
        [{"bytes": x, "path": "a.png"} for x in encoded], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    features: dict[str, Any] = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"index": list(range(len(labels))), image: structs, label: pa.array(labels)})
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=7)
    return file


def varint(n: int) -> bytes:
    """Protocol Buffers' base 128 number."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a Protocol Buffers message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(**features: bytes | int) -> bytes:
    """A tf.train.Example, written byte for byte after its .proto files; `__` in a key stands for `/`."""
    entries = b""
    for key, value in features.items():
        bytes_list, int64_list = 1, 3
        inner = (
            field(bytes_list, field(1, value))
            if isinstance(value, bytes)
            else field(int64_list, field(1, varint(value)))
        )
        entries += field(1, field(1, key.replace("__", "/").encode()) + field(2, inner))
    return field(1, entries)


def write_arrayrecord(file: Path, records: Sequence[bytes]) -> Path:
    """The records, each to be reached on its own."""
    from array_record.python.array_record_module import ArrayRecordWriter

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return file


def write(name: str, path: Path, images: Sequence[np.ndarray], labels: Sequence[int]) -> str:
    """The images in a format of `FORMATS`; the source to load them from."""
    if name == "image_folder":
        return str(write_folder(path / "folder", images, labels))
    if name == "parquet":
        names = [f"c{i}" for i in range(max(labels) + 1)]
        return str(write_parquet(path / "train.parquet", [png(x) for x in images], labels, names=names))
    records = [example(image=png(x), label=int(y)) for x, y in zip(images, labels, strict=True)]
    return str(write_arrayrecord(path / "some.array_record", records))


LAZY = ("image_folder", "parquet", "arrayrecord")


def reading(part: Part, note: Callable[[list[int]], object]) -> Part:
    """`part` with `note(records)` called before images are read; those of a batch are read at once."""
    images = part.images
    assert isinstance(images, LazyImages)
    read = images.records.read
    records = dataclasses.replace(images.records, read=lambda rows: (note(list(rows)), read(rows))[1])
    return Part(dataclasses.replace(images, records=records), part.labels)
