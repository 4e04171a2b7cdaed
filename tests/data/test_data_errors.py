"""Every damaged, missing or impossible data set is a DataError that says what came and what to do next."""

import gzip
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nas.config import Data
from nas.data import FORMATS, load_data
from nas.errors import DataError

X = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
Y = np.arange(20) % 2


def fails(source: Path | str, match: str, **config: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        load_data(Data(source=str(source), **config))
    assert "\n" not in str(caught.value)


def npz(path: Path, **arrays: Any) -> Path:
    """A sound npz, but for `arrays`."""
    arrays = {"x_train": X, "y_train": Y} | arrays
    np.savez(path / "d.npz", **{k: v for k, v in arrays.items() if v is not None})
    return path / "d.npz"


# -- finding it


def test_a_missing_path_names_the_nearest_sibling(tmp_path):
    npz(tmp_path)
    fails(tmp_path / "b.npz", r"no such file.*Did you mean .*d\.npz")
    fails(tmp_path / "nowhere" / "else" / "d.npz", "has no 'nowhere'")
    fails(tmp_path / "b.npz", "no such file", format="npz")


def test_an_unknown_source_lists_what_was_found_and_every_format(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for source in (tmp_path, tmp_path / "notes.txt"):
        fails(source, r"not recognised: this is a .*\.?txt.*" + ".*".join(FORMATS))
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "a folder with nothing")


def test_an_unknown_format_names_the_nearest(tmp_path):
    fails(npz(tmp_path), "Did you mean `npz`", format="npy")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "digits"])
def test_a_format_that_does_not_fit_the_path_is_a_data_error(tmp_path, name):
    (tmp_path / "file.bin").write_bytes(b"nothing of the kind")
    (tmp_path / "folder").mkdir()
    fails(tmp_path / "file.bin", "file.bin", format=name)
    fails(tmp_path / "folder", "folder", format=name)


def test_permission_denied_names_the_file(tmp_path, monkeypatch):
    path = npz(tmp_path)
    if os.geteuid():
        path.chmod(0)
    else:  # root reads everything

        def refuse(self: Path, *args: Any) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refuse)
    fails(path, r"d\.npz: cannot be read: Permission denied")


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    fails("digits", "pip install scikit-learn")


# -- what any format can get wrong, told through npz


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"y_train": Y - 1}, "label -1 of training image 0 is negative"),
        ({"y_train": Y + 0.5}, "float64, not integers"),
        ({"y_train": Y.astype(bool)}, "bool, not integers"),
        ({"y_train": np.array(["cat", "dog", "eel"])[Y % 3]}, "not integers.*np.unique.names, return_inverse"),
        ({"y_train": Y[:-1]}, "20 training images but 19 labels"),
        ({"y_train": np.eye(2)[Y]}, r"labels have shape \[20, 2\].*argmax"),
        ({"y_train": Y + 1}, "class 0 of 3 has no training image"),
        ({"y_train": Y * 10**12}, "class 1 of 1000000000001 has no training image"),
        ({"y_train": Y * 0}, "only one class"),
        ({"x_test": X, "y_test": Y + 1}, "label 2 of test image 1 is out of range: 2 classes"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "training set is empty"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "test set is empty"),
        ({"x_train": X[:, :0]}, "no empty side"),
        ({"x_train": X[:, 0]}, r"images have shape \[20, 4\]"),
        ({"x_train": np.stack([X] * 2, -1)}, "2 channels.*one or three"),
        ({"x_train": np.stack([X] * 4, -1)}, "4 channels.*drop the alpha"),
        ({"x_train": np.stack([X] * 3, 1)}, r"channels-first.*transpose\(0, 2, 3, 1\)"),
        ({"x_test": X[:, :3], "y_test": Y}, "test images are 3x4x1, training images 4x4x1"),
        ({"class_names": np.array(["cat"])}, "only one class"),
        ({"class_names": np.array(["cat", "dog", "cow"])}, r"class 2 \('cow'\) of 3 has no training image"),
        ({"class_names": np.array(["cat", "cat"])}, "class names repeat"),
        ({"class_names": np.array([1, 2])}, "class_names is int64"),
        ({"y_train": np.arange(20) % 3, "class_names": np.array(["cat", "dog"])}, "label 2 .* out of range: 2 classes"),
        ({"x_train": X.astype(np.int32)}, "x_train is int32"),
        ({"x_train": X.astype(np.float32)}, "float32 from 0 to 255.*divide by 255"),
        ({"x_train": X / 255 - 0.1}, "must lie in 0..1"),
        ({"x_train": np.where(X > 128, np.nan, 0.5)}, r"x_train\[.*\] is nan"),
        ({"x_train": np.full(X.shape, np.inf)}, r"x_train\[0, 0, 0\] is inf"),
        ({"y_train": None}, "x_train without y_train"),
        ({"x_val": X}, "x_val without y_val"),
        ({"x_train": None, "y_train": None}, "no x_train and y_train in it"),
    ],
)  # fmt: skip
def test_impossible_arrays_are_refused(tmp_path, arrays, match):
    fails(npz(tmp_path, **arrays), match)


def test_python_objects_are_never_unpickled(tmp_path):
    objects = np.array([X[0], X[0, :2]], dtype=object)
    fails(npz(tmp_path, x_train=objects), "x_train holds Python objects")


def test_splits_without_an_image_are_refused(tmp_path):
    path = npz(tmp_path, x_train=X[:4], y_train=Y[:4])
    fails(path, "data.test = 0.01 leaves no test image of 4", test=0.01)
    fails(path, "data.validation = 0.01 leaves no validation image", validation=0.01, test=0.5)
    fails(path, "data.validation = 0.5 leaves no validation image of 1", train_images=1, validation=0.5, test=0.5)


def test_a_training_subset_of_one_class_is_refused(tmp_path):
    path = npz(tmp_path, y_train=(np.arange(20) == 0).astype(int))
    fails(path, "training images left after splitting are of only one class", train_images=3, validation=0.4)


# -- damaged files


def test_damaged_npz_files_are_refused(tmp_path):
    sound = npz(tmp_path).read_bytes()
    broken = tmp_path / "broken.npz"
    for content in (b"", b"plain text", sound[: len(sound) // 2]):
        broken.write_bytes(content)
        fails(broken, "cannot be read as .npz.*truncated or damaged")
    flipped = bytearray(sound)
    flipped[300] ^= 0xFF  # in the pixels: the checksum finds it
    broken.write_bytes(flipped)
    fails(broken, "x_train cannot be read")
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("x_train.npy", b"no array")
    fails(broken, "x_train cannot be read.*header")


@pytest.fixture
def batches(tmp_path: Path) -> Path:
    """A sound folder of CIFAR-10 batches, two images each."""
    pixels = bytes(3072)
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(bytes([2 * i]) + pixels + bytes([2 * i + 1]) + pixels)
    (tmp_path / "test_batch.bin").write_bytes(bytes([0]) + pixels)
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    return tmp_path


def test_a_missing_cifar_batch_is_named(batches):
    (batches / "data_batch_3.bin").unlink()
    fails(batches, r"data_batch_3\.bin missing.*cifar-10-binary.tar.gz")


def test_a_truncated_cifar_batch_is_named(batches):
    (batches / "data_batch_3.bin").write_bytes(bytes(3072))
    fails(batches, r"data_batch_3\.bin: 3072 bytes.*records of 3073")


def test_a_cifar_label_out_of_range_is_refused(batches):
    (batches / "test_batch.bin").write_bytes(bytes([10]) + bytes(3072))
    fails(batches, "label 10 of test image 0 is out of range")


def test_cifar_class_names_must_be_ten(batches):
    (batches / "batches.meta.txt").write_text("a\nb\n")
    fails(batches, "2 class names.*must hold 10")


def test_two_cifar_sets_in_one_folder_are_ambiguous(tmp_path):
    for name in ("cifar-10-batches-bin", "cifar-100-binary"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.bin").touch()
    fails(tmp_path, "is one of them")


def test_a_damaged_cifar_archive_is_refused(batches):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(batches.iterdir()):
            archive.add(file, arcname=file.name)
    path = batches / "some.tar.gz"
    path.write_bytes(buffer.getvalue())
    for content in (buffer.getvalue()[:-40], b"", b"no archive"):
        path.write_bytes(content)
        fails(path, r"some\.tar\.gz: cannot be read as .tar.gz")
    with tarfile.open(path, "w:gz"):
        pass
    fails(path, "missing")


def idx_folder(path: Path, **files: bytes) -> Path:
    images = bytes([0, 0, 8, 3]) + np.array(X.shape, ">u4").tobytes() + X.tobytes()
    labels = bytes([0, 0, 8, 1]) + np.array([20], ">u4").tobytes() + Y.astype(np.uint8).tobytes()
    content = {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": labels} | files
    for name, data in content.items():
        if data:
            (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"train-images-idx3-ubyte": b"\0\0\x08\x01more than a header"}, "starts with 00 00 08 01"),
        ({"train-images-idx3-ubyte": b"\0\0\x08\x03\0\0"}, "starts with 00 00 08 03"),
        ({"train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x14few"}, r"11 bytes, but its header says \[20\]"),
        ({"train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x02\0\1"}, "20 training images but 2 labels"),
        ({"train-labels-idx1-ubyte": b""}, "images of train are there alone.*train-labels-idx1-ubyte"),
        ({"train-labels-idx1-ubyte": b"", "train-images-idx3-ubyte": b"", "t10k-images-idx3-ubyte": b"x",
          "t10k-labels-idx1-ubyte": b"x"}, "starts with 78"),
    ],
)  # fmt: skip
def test_damaged_idx_files_are_refused(tmp_path, files, match):
    fails(idx_folder(tmp_path, **files), match)


def test_idx_without_training_files_is_refused(tmp_path):
    fails(tmp_path, "no train-images-idx3-ubyte", format="idx")


def test_a_damaged_gzip_is_refused(tmp_path):
    idx_folder(tmp_path)
    whole = gzip.compress((tmp_path / "train-images-idx3-ubyte").read_bytes())
    (tmp_path / "train-images-idx3-ubyte").unlink()
    for content in (whole[:-20], b"plain"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        fails(tmp_path, "cannot be unzipped")


# -- image folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound image folder: a/0.png .. b/4.png, 4x4 grey."""
    for i, image in enumerate(X[:10]):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path


def test_a_corrupt_image_is_named(folder):
    sound = (folder / "a" / "0.png").read_bytes()
    for content in (sound[:-30], sound[:40], b"", b"no image"):
        (folder / "a" / "0.png").write_bytes(content)
        fails(folder, r"a.0\.png: cannot be decoded")


def test_different_sizes_name_two_files_and_image_size(folder):
    Image.new("L", (5, 7)).save(folder / "b" / "odd.png")
    fails(folder, r"a.0\.png is 4x4 and .*odd\.png is 5x7.*data.image_size")


def test_one_class_folder_is_refused(folder):
    for file in (folder / "b").iterdir():
        file.unlink()
    (folder / "b").rmdir()
    fails(folder, "only one class")


def test_a_class_folder_without_images_is_refused(folder):
    (folder / "c").mkdir()
    fails(folder, "no .png, .jpg, .jpeg file in it, but nothing")
    (folder / "c" / "x.webp").touch()
    fails(folder, r"but x\.webp")


def into_splits(folder: Path) -> None:
    (folder / "train").mkdir()
    for name in "ab":
        (folder / name).rename(folder / "train" / name)


def test_classes_of_the_test_set_must_be_known(folder):
    into_splits(folder)
    (folder / "test" / "c").mkdir(parents=True)
    fails(folder, r"'c' is no class of the training set \(a, b\)")


def test_an_empty_test_folder_is_refused(folder):
    into_splits(folder)
    (folder / "test" / "a").mkdir(parents=True)
    fails(folder, "test: no image in it")


def test_two_validation_folders_are_ambiguous(folder):
    into_splits(folder)
    (folder / "val").mkdir()
    (folder / "valid").mkdir()
    fails(folder, "both val/ and valid/")


def test_a_set_under_another_name_is_not_left_out_unnoticed(folder):
    into_splits(folder)
    (folder / "testing" / "a").mkdir(parents=True)
    fails(folder, "testing: has the training set's classes.*Rename it")
