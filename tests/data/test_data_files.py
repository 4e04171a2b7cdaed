"""Images that stay in their files: the same pixels as in memory, decoded only when asked for, and told when damaged."""

import dataclasses
import io
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import filesets
import numpy as np
import pytest
from filesets import LAZY, example, pictures, png, write_arrayrecord, write_folder, write_parquet
from PIL import Image

import nas.data
from nas.config import Data
from nas.data import LazyImages, load_data
from nas.data.cache import cached
from nas.data.decode import decode, header
from nas.data.lazy import Ranges
from nas.errors import DataError
from nas.evaluate.batches import labelled_batches

X, Y = pictures(30, 3, (5, 6, 3))


def load(source: Path | str, storage: str = "files", **config: Any) -> nas.data.Dataset:
    return load_data(Data(source=str(source), storage=storage, **config))


def fails(source: Path | str, match: str, **config: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load(source, **config)
    assert "\n" not in str(caught.value)


@pytest.fixture(params=LAZY)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same images in each format: two sizes, the last third grey."""
    large, _ = pictures(10, 3, (9, 7, 3), seed=1)
    return filesets.write(request.param, tmp_path, [*X[:10], *large, *X[20:, ..., 0]], Y.tolist())


# -- the laws


@pytest.mark.parametrize("side", [4, 8])
def test_files_give_the_same_data_as_memory_to_the_bit(source, side):
    files, memory = (load(source, storage, image_size=side, test=0.1) for storage in ("files", "memory"))
    assert isinstance(files.train.images, LazyImages)
    for part in ("val", "test"):
        assert isinstance(getattr(files, part).images, np.ndarray)
    for part in ("train", "val", "test"):
        a, b = getattr(files, part), getattr(memory, part)
        assert a.images.shape == b.images.shape
        assert a.images.dtype == b.images.dtype
        np.testing.assert_array_equal(a.images[:], b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(files.mean, memory.mean)
    np.testing.assert_array_equal(files.std, memory.std)


@pytest.mark.parametrize("index", [3, -1, slice(2, 9, 3), [4, 0, 4], np.array([], int), np.arange(4).reshape(2, 2)])
def test_indexing_is_numpys(source, index):
    files, memory = (load(source, storage, image_size=4).train for storage in ("files", "memory"))
    np.testing.assert_array_equal(files.images[index], memory.images[index])
    order = np.random.default_rng(0).permutation(len(memory))
    np.testing.assert_array_equal(files.take(order).take(order).images[index], memory.images[order][order][index])


def test_only_what_is_asked_for_is_decoded(source, monkeypatch):
    decoded = []

    def counting(encoded: Any, name: str, side: int | None = None) -> np.ndarray:
        decoded.append(name)
        return decode(encoded, name, side)

    monkeypatch.setattr("nas.data.lazy.decode", counting)
    monkeypatch.setattr(nas.data, "SAMPLE", 2)
    data = load(source, image_size=4)
    assert len(decoded) == len(data.val) + len(data.test) + 2
    assert len(data.digest) == 64
    part = data.train.take(np.array([3, 1, 2]))
    assert len(decoded) == len(data.val) + len(data.test) + 2
    assert part.images[[1, 1]].shape == (2, 4, 4, 3)
    assert len(decoded) == len(data.val) + len(data.test) + 4


def test_auto_takes_files_beyond_the_limit(source, monkeypatch):
    bytes_in_memory = load(source, "memory", image_size=4).train.images.nbytes
    for limit, lazy in ((bytes_in_memory, False), (bytes_in_memory - 1, True)):
        monkeypatch.setattr(nas.data, "FILES_ABOVE_BYTES", limit)
        assert isinstance(load(source, "auto", image_size=4).train.images, LazyImages) == lazy


@pytest.mark.parametrize("storage", ["auto", "files", "memory"])
def test_validation_and_test_images_beyond_the_limit_stay_in_their_files_too(source, storage, monkeypatch):
    def loaded():
        data = load(source, storage, image_size=4, validation=0.5, test=0.2)
        return data, [isinstance(part.images, LazyImages) for part in (data.train, data.val, data.test)]

    whole, lazy = loaded()
    assert lazy == [storage == "files", False, False]
    monkeypatch.setattr(nas.data, "FILES_ABOVE_BYTES", whole.test.images.nbytes)
    data, lazy = loaded()
    assert lazy == [storage != "memory", storage != "memory", False]
    size = {"batch_size": 4, "size": (4, 4)}
    for mine, wanted in zip(
        labelled_batches(data, data.val, **size), labelled_batches(whole, whole.val, **size), strict=True
    ):
        np.testing.assert_array_equal(mine, wanted)  # what is evaluated


def test_many_images_are_decoded_by_all_threads_together(source, monkeypatch):
    images, seen, decoders = load(source, image_size=4).train.images, [], set()

    def noting(encoded: Any, name: str, side: int | None = None) -> np.ndarray:
        decoders.add(threading.get_ident())
        return decode(encoded, name, side)

    monkeypatch.setattr("nas.data.lazy.decode", noting)
    monkeypatch.setattr("nas.data.lazy.CHUNK", 2)
    for many in (len(images) + 1, len(images)):
        monkeypatch.setattr("nas.data.lazy.MANY", many)
        decoders.clear()
        seen.append(images[:])
        assert (decoders == {threading.get_ident()}) == (many > len(images))
    np.testing.assert_array_equal(*seen)


def test_the_digest_follows_files_order_labels_and_size_but_not_the_place(tmp_path):
    folder = write_folder(tmp_path / "one", X, Y)
    data = load(folder)
    shutil.copytree(folder, tmp_path / "two")
    assert load(tmp_path / "two").digest == data.digest == load(folder, threads=1).digest
    others = [load(folder, seed=1), load(folder, image_size=4), load(folder, validation=0.3), load(folder, "memory")]
    (folder / "c0" / "0000.png").write_bytes(png(X[0]) + b" ")
    others.append(load(folder))
    (folder / "c0" / "0000.png").write_bytes(png(X[0]))
    (folder / "c0" / "0000.png").rename(folder / "c1" / "0000.png")
    others.append(load(folder))
    relabelled = data.train.labels.copy()
    relabelled[0] += 1
    others.append(dataclasses.replace(data, train=nas.data.Part(data.train.images, relabelled)))
    assert len({data.digest, *(other.digest for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_headers_tell_what_decoding_gives(kind, turned):
    modes = {
        "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
        "JPEG": ["L", "RGB", "CMYK"],
        "WEBP": ["RGB", "RGBA"],
        "TIFF": ["1", "L", "P", "RGB", "CMYK", "I;16", "I"],
    }[kind]
    exif = Image.Exif()
    exif[0x0112] = turned
    for mode in modes:
        pixels = np.zeros((4, 6), np.uint16 if mode == "I;16" else np.uint8)
        image, file = Image.fromarray(pixels), io.BytesIO()
        (image if mode == "I;16" else image.convert(mode)).save(file, kind, exif=exif)
        assert header(file.getvalue(), "x") == decode(file.getvalue(), "x").shape, mode


def test_rows_are_found_in_the_file_that_has_them():
    ranges = Ranges([3, 0, 2])
    assert len(ranges) == 5
    assert [ranges.find(row) for row in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


# -- what the formats look like


def test_parquet_of_hugging_face_has_its_splits_and_class_names(tmp_path):
    encoded = [png(x) for x in X]
    names = ["cat", "dog", "cow"]
    for name, rows in {"train": slice(0, 20), "validation": slice(20, 25), "test": slice(25, 30)}.items():
        for shard in range(2):
            own = slice(rows.start + shard, rows.stop, 2)
            file = tmp_path / "data" / f"{name}-{shard:05d}-of-00002.parquet"
            write_parquet(file, encoded[own], Y[own].tolist(), names=names, columns="img fine_label")
    data = load(tmp_path)
    assert data.class_names == tuple(names)
    assert [len(part) for part in (data.train, data.val, data.test)] == [20, 5, 5]
    assert {x.tobytes() for x in data.train.images[:]} == {x.tobytes() for x in X[:20]}
    (tmp_path / "data" / "test-00001-of-00002.parquet").unlink()
    fails(tmp_path, "test-00001-of-00002 is missing.*All 2 shards")
    (tmp_path / "data" / "more.parquet").write_bytes(b"")
    fails(tmp_path, r"more\.parquet: its name does not say to which split")


def test_parquet_labels_may_be_strings_and_images_plain_bytes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())):
        labels = pa.array([f"c{y}" for y in Y]).cast(kind)
        pq.write_table(pa.table({"image": [png(x) for x in X], "label": labels}), tmp_path / "a.parquet")
        data = load(tmp_path / "a.parquet")
        assert data.class_names == ("c0", "c1", "c2")
        want = {x.tobytes(): y for x, y in zip(X, Y, strict=True)}
        assert all(want[x.tobytes()] == y for x, y in zip(data.train.images[:], data.train.labels, strict=True))


def test_arrayrecord_of_tensorflow_datasets_has_its_splits_and_class_names(tmp_path):
    for name, rows in (("train", slice(0, 20)), ("test", slice(20, 30))):
        for shard in range(2):
            records = [
                example(image=png(x), label=int(y), file_name=b"x") for x, y in zip(X[rows], Y[rows], strict=True)
            ]
            write_arrayrecord(tmp_path / f"some-{name}.array_record-{shard:05d}-of-00002", records[shard::2])
    (tmp_path / "label.labels.txt").write_text("cat\ndog\ncow\n")
    (tmp_path / "features.json").write_text("{}")
    data = load(tmp_path)
    assert data.class_names == ("cat", "dog", "cow")
    assert len(data.test) == 10
    want = {x.tobytes(): y for x, y in zip(X, Y, strict=True)}
    assert all(want[x.tobytes()] == y for x, y in zip(data.train.images[:], data.train.labels, strict=True))
    pairs = zip(X, Y, strict=True)
    records = [example(image__encoded=png(x), image__class__label="zyx"[y].encode()) for x, y in pairs]
    data = load(write_arrayrecord(tmp_path / "other" / "names.arrayrecord", records))
    assert data.class_names == ("x", "y", "z")
    assert all(want[x.tobytes()] == 2 - y for x, y in zip(data.train.images[:], data.train.labels, strict=True))


# -- the cache


def test_what_is_made_from_files_is_made_once_and_again_when_they_change(tmp_path, cache):
    for write, suffix in ((write_parquet, ".arrow"), (_records, ".npz")):
        file = write(tmp_path / f"a.{'parquet' if write is write_parquet else 'array_record'}", [png(x) for x in X], Y)
        load(file)
        made = [p for p in cache.iterdir() if p.suffix == suffix]
        before = made[0].stat().st_mtime_ns, made[0].stat().st_ino
        load(file)
        assert (made[0].stat().st_mtime_ns, made[0].stat().st_ino) == before
        write(file, [png(255 - x) for x in X], Y)
        os.utime(file, ns=(1, 1))
        data = load(file)
        assert {x.tobytes() for x in data.train.images[:]} <= {(255 - x).tobytes() for x in X}
        assert len([p for p in cache.iterdir() if p.suffix == suffix]) == 2


def _records(file: Path, encoded: list[bytes], labels: np.ndarray) -> Path:
    return write_arrayrecord(file, [example(image=x, label=int(y)) for x, y in zip(encoded, labels, strict=True)])


def test_a_file_of_the_cache_is_whole_or_missing_and_written_by_one(cache):
    calls = []

    def write(target: Path) -> None:
        calls.append(target)
        target.write_text("half")
        if len(calls) == 1:
            raise KeyboardInterrupt
        target.write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        cached("thing", write)
    assert not (cache / "thing").exists()
    threads = [threading.Thread(target=cached, args=("thing", write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 2
    assert (cache / "thing").read_text() == "whole"


@pytest.mark.parametrize("name", LAZY)
def test_a_damaged_or_impossible_cache_says_what_to_do(tmp_path, cache, monkeypatch, name):
    monkeypatch.setattr(sys.modules["nas.data.image_folder"], "MANY", 5)
    source = filesets.write(name, tmp_path, list(X), Y.tolist())
    digest = load(source).digest
    made = next(file for file in cache.iterdir() if not file.name.startswith("."))
    before = made.stat().st_mtime_ns
    assert load(source).digest == digest
    assert made.stat().st_mtime_ns == before
    for size in (0, 100):
        made.write_bytes(made.read_bytes()[:size])
        fails(source, r"\.(arrow|npz|npy): damaged .*delete it, and it is made again")
        made.unlink()
        assert load(source).digest == digest
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    fails(source, "cannot be written: .*XDG_CACHE_HOME")


# -- mistakes


def test_a_wrong_storage_names_the_right_ones(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=X, y_train=Y)
    fails(tmp_path / "a.npz", "data.storage = 'file' is unknown. Did you mean `files`", storage="file")
    fails(tmp_path / "a.npz", "storage = 'files' needs images that are files.*image_folder, parquet or arrayrecord")


@pytest.mark.parametrize(
    ("library", "name", "match"),
    [
        ("grain", "image_folder", "training from files"),
        ("pyarrow", "parquet", "Parquet"),
        ("array_record", "arrayrecord", "Array"),
    ],
)
def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch, library, name, match):
    source = filesets.write(name, tmp_path, list(X), Y.tolist())
    monkeypatch.setattr("nas.data.lazy.find_spec", lambda module: None if module == library else module)
    fails(source, rf"{match}.* needs the package .*pip install (grain|pyarrow|array-record)` ")


def test_an_image_damaged_behind_its_header_is_named_when_it_is_decoded(tmp_path):
    for name in LAZY:
        images = [np.full((40, 40, 3), 10 * i, np.uint8) + pictures(1, 1, (40, 40, 3), i)[0][0] // 2 for i in range(12)]
        encoded = [png(x) for x in images]
        source = tmp_path / name
        source.mkdir()
        labels = [i % 2 for i in range(12)]
        broken = [x[: len(x) // 2] for x in encoded]
        if name == "image_folder":
            for x, y, i in zip(broken, labels, range(12), strict=True):
                (source / f"c{y}").mkdir(exist_ok=True)
                (source / f"c{y}" / f"{i:02}.png").write_bytes(x)
            where = r"c\d/\d\d\.png"
        elif name == "parquet":
            write_parquet(source / "a.parquet", broken, labels)
            where = r"a\.parquet, row \d+"
        else:
            _records(source / "a.array_record", broken, np.array(labels))
            where = r"a\.array_record, record \d+"
        fails(source, rf"{where}: cannot be decoded as an image \(.*truncated")


def test_images_of_other_sizes_or_vanished_files_are_told(tmp_path):
    folder = write_folder(tmp_path, [*X, np.zeros((9, 9, 3), np.uint8)], [*Y, 0])
    fails(folder, r"0000\.png is 6x5 and .*0030\.png is 9x9 pixels.*set data.image_size")
    data = load(folder, image_size=4)
    for file in folder.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"png: cannot be read: No such file.*bring it back"):
        data.train.images[:1]


def test_a_file_that_changes_under_way_is_told(tmp_path):
    data = load(write_folder(tmp_path, X, Y))
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(png(np.zeros((7, 7, 3), np.uint8)))
    with pytest.raises(DataError, match=r"7x7x3 pixels .* but 5x6x3 by its header.*has changed"):
        data.train.images[:1]


def _table(file: Path, **columns: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"pixels": [b""]}, "no column of images: its columns are pixels. One of them must be called image, img"),
        ({"image": [b""], "y": [1]}, "no column of labels: its columns are image, y"),
        ({"image": ["a.png"], "label": [1]}, "its images are string. They must be the bytes of image files"),
        ({"image": [[1, 2]], "label": [1]}, "its images are list"),
        ({"image": [b"GIF?"], "label": [1]}, r"a\.parquet, row 0: cannot be decoded as an image"),
        ({"image": [png(X[0]), None], "label": [0, 1]}, "row 1: no image bytes in it.*images embedded"),
        ({"image": [png(X[0]), png(X[1])], "label": [0, None]}, "row 1: no label"),
        ({"image": [png(x) for x in X], "label": [0.5] * 30}, "labels are double|labels are float64, not integers"),
        ({"image": [png(x) for x in X], "label": (Y - 1).tolist()}, "label -1 of training image 0 is negative"),
        ({"image": [png(x) for x in X], "label": (Y + 1).tolist()}, "class 0 of 4 has no training image"),
    ],
)  # fmt: skip
def test_impossible_parquet_is_refused(tmp_path, columns, match):
    fails(_table(tmp_path / "a.parquet", **columns), match)


def test_parquet_labels_out_of_range_differing_types_and_damage_are_refused(tmp_path):
    encoded = [png(x) for x in X]
    file = write_parquet(tmp_path / "one" / "train.parquet", encoded, Y, names=["cat", "dog"])
    fails(file, "label 2 of training image 2 is out of range: 2 classes allow 0 to 1")
    write_parquet(tmp_path / "two" / "train-0.parquet", encoded, Y)
    write_parquet(tmp_path / "two" / "test-0.parquet", encoded, [f"c{y}" for y in Y])
    fails(tmp_path / "two", r"column 'label' is int64 in train-0\.parquet but string in test-0\.parquet")
    _table(tmp_path / "two" / "test-0.parquet", image=encoded)
    fails(tmp_path / "two", r"test-0\.parquet: no column 'label', as train-0\.parquet has; its columns are image")
    write_parquet(tmp_path / "three" / "train-0.parquet", encoded, [f"c{y}" for y in Y])
    write_parquet(tmp_path / "three" / "test-0.parquet", encoded, ["c9" for _ in Y])
    fails(tmp_path / "three", r"test-0\.parquet, row 0: label 'c9' is no class; these are c0, c1, c2")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    fails(file, r"train\.parquet: cannot be read as Parquet \(.*truncated or damaged")
    file.write_bytes(content[:-60] + b"\xff" * 40 + content[-20:])
    fails(file, r"train\.parquet: cannot be read as Parquet")
    middle = len(content) // 3
    file.write_bytes(content[:middle] + b"\xff" * 200 + content[middle + 200 :])
    fails(file, r"train\.parquet(: cannot be read as Parquet|, row \d+: cannot be decoded)")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (b"\xff\xff", r"a\.array_record, record 2: not a tf.train.Example"),
        (example(image=png(X[0])), "record 2: no feature label or image/class/label; it has image"),
        (example(label=1), "record 2: no feature image or image/encoded; it has label"),
        (example(label=1, image=3), "record 2: 0 byte strings under its image key"),
        (example(label=1, image=b"GIF?"), "record 2: cannot be decoded as an image"),
        (example(label=b"cat", image=png(X[0])), "labels are strings in one record and numbers in another"),
        (example(label=7, image=png(X[0])), "class 2 of 8 has no training image"),
    ],
)
def test_impossible_arrayrecord_is_refused(tmp_path, record, match):
    fine = [example(image=png(x), label=i % 2) for i, x in enumerate(X[:10])]
    fails(write_arrayrecord(tmp_path / "a.array_record", [*fine[:2], record, *fine[2:]]), match)


def test_damaged_arrayrecord_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 60, 60, 3), np.uint8)
    file = _records(tmp_path / "a.array_record", [png(x) for x in noise], np.arange(64) % 2)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    fails(file, r"a\.array_record: cannot be read as ArrayRecord \(.*truncated, damaged")
    middle = len(content) // 2
    file.write_bytes(content[:middle] + b"\xff" * 100 + content[middle + 100 :])
    fails(file, r"a\.array_record, record \d+: cannot be read \(.*damaged")


def test_split_names_are_words_of_the_file_names(tmp_path):
    write_parquet(tmp_path / "training.parquet", [png(x) for x in X], Y)
    write_parquet(tmp_path / "latest.parquet", [png(x) for x in X], Y)
    assert len(load(tmp_path).train) > 30
    (tmp_path / "latest.parquet").rename(tmp_path / "test.parquet")
    fails(tmp_path, r"training\.parquet: its name does not say")
    (tmp_path / "training.parquet").unlink()
    fails(tmp_path, "only files of test, none of train")
