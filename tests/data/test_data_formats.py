"""Laws of the data room: every format gives back the pixels it was written with; splits are fair and repeatable."""

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import filesets
import numpy as np
import pytest
from PIL import Image

from nas.config import Data
from nas.data import FORMATS, Dataset, Part, load_data, recognise
from nas.data.dataset import mean_and_std
from nas.data.splits import stratified

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def pictures(n: int, classes: int, shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images [n, *shape], all different, and labels that use every class."""
    images = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return images, np.arange(n, dtype=np.uint8) % classes


def write_npz(folder: Path) -> tuple[str, Part]:
    x, y = pictures(60, 3, (5, 6, 3))
    np.savez(folder / "some.npz", x_train=x, y_train=y)
    return str(folder / "some.npz"), Part(x, y)


def write_image_folder(folder: Path) -> tuple[str, Part]:
    x, y = pictures(60, 3, (5, 6, 3))
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        (folder / "abc"[label]).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / "abc"[label] / f"{i:03}.PNG")
    (folder / "README.txt").write_text("a stray file")
    (folder / ".hidden").mkdir()
    (folder / "a" / ".thumb.png").write_text("not an image")
    (folder / "a" / "notes.txt").write_text("not an image")
    return str(folder), Part(x, y)


def write_cifar(folder: Path, *, classes: int = 10, label_bytes: int = 1) -> tuple[str, Part]:
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if classes == 10 else ["train.bin"]
    x, y = pictures(classes * 6, classes, (32, 32, 3))
    rows = np.concatenate(
        [np.zeros((len(x), label_bytes - 1)), y[:, None], x.transpose(0, 3, 1, 2).reshape(len(x), -1)], 1
    )
    rows = rows.astype(np.uint8)
    train, test = rows[: 5 * classes], rows[5 * classes :]
    for name, part in zip(names, np.split(train, len(names)), strict=True):
        (folder / name).write_bytes(part.tobytes())
    (folder / ("test_batch.bin" if classes == 10 else "test.bin")).write_bytes(test.tobytes())
    text = "\n".join(f"name{i}" for i in range(classes)) + "\n\n"
    (folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")).write_text(text)
    return str(folder), Part(x, y)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path) -> tuple[str, Part]:
    x, y = pictures(60, 3, (5, 6))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(x[:50])))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(y[:50])))
    (folder / "t10k-images.idx3-ubyte").write_bytes(idx_bytes(x[50:]))
    (folder / "t10k-labels.idx1-ubyte").write_bytes(idx_bytes(y[50:]))
    return str(folder), Part(x[..., None], y)


def write_digits(folder: Path) -> tuple[str, Part]:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    return "digits", Part(np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1), labels)


def write_parquet(folder: Path) -> tuple[str, Part]:
    x, y = pictures(60, 3, (5, 6, 3))
    return filesets.write("parquet", folder, list(x), y.tolist()), Part(x, y)


def write_arrayrecord(folder: Path) -> tuple[str, Part]:
    x, y = pictures(60, 3, (5, 6, 3))
    return filesets.write("arrayrecord", folder, list(x), y.tolist()), Part(x, y)


WRITERS: dict[str, Callable[[Path], tuple[str, Part]]] = {
    "digits": write_digits,
    "npz": write_npz,
    "image_folder": write_image_folder,
    "cifar": write_cifar,
    "idx": write_idx,
    "parquet": write_parquet,
    "arrayrecord": write_arrayrecord,
}


@pytest.fixture(params=list(FORMATS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str, Part]:
    """(format, source, all images) of a small data set."""
    return request.param, *WRITERS[request.param](tmp_path)


def rows(*parts: Part) -> list[tuple[bytes, int]]:
    """All (pixels, label) pairs, sorted: equal lists, equal images, whatever their order."""
    return sorted((i.tobytes(), int(y)) for part in parts for i, y in zip(part.images, part.labels, strict=True))


def test_every_format_gives_back_the_written_pixels_and_labels(written):
    name, source, whole = written
    data = load_data(Data(source=source))
    assert recognise(Path(source)) == name
    assert rows(data.train, data.val, data.test) == rows(whole)
    for part in (data.train, data.val, data.test):
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int32
        assert part.images.shape == (len(part), *data.image_shape)
    assert data.classes == len(data.class_names) == len(np.unique(whole.labels))


def test_the_same_config_gives_the_same_data_and_another_seed_another_split(written):
    _, source, _ = written
    one, same, other = (load_data(Data(source=source, seed=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train.images, same.train.images)
    assert one.digest == same.digest != other.digest
    assert rows(one.val) != rows(other.val)


def test_splits_hold_out_the_same_share_of_every_class(written):
    _, source, _ = written
    data = load_data(Data(source=source, validation=0.2))
    train, val = (np.bincount(part.labels, minlength=data.classes) for part in (data.train, data.val))
    assert np.abs(val - 0.2 * (train + val)).max() <= 1
    assert len(data.val) == round(0.2 * (len(data.train) + len(data.val)))


def test_normalised_training_images_have_mean_0_and_deviation_1(written):
    _, source, _ = written
    data = load_data(Data(source=source))
    normal = data.normalise(data.train.images)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=1e-4)


def test_every_format_can_be_resized_and_subset(written):
    _, source, _ = written
    data = load_data(Data(source=source, image_size=12, train_images=40, test_images=7))
    assert data.image_shape[:2] == (12, 12)
    assert len(data.train) + len(data.val) == 40
    assert len(data.test) == 7


def test_a_subset_is_part_of_the_whole_and_leaves_the_test_set_alone(written):
    _, source, _ = written
    whole, few = load_data(Data(source=source)), load_data(Data(source=source, train_images=40))
    assert set(rows(few.train, few.val)) <= set(rows(whole.train, whole.val))
    assert rows(few.test) == rows(whole.test)


def test_the_split_of_digits_never_changes():
    data = load_data(Data(source="digits"))
    assert repr(data) == "Dataset('digits', 10 classes, 8x8x1, train 1150, val 288, test 359, sha256 5dc2b780a609)"
    assert len(data.digest) == 64


# -- splitting and normalising


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_stratified_keeps_every_image_once_and_one_of_every_class(share):
    labels = np.repeat(np.arange(5), [1, 2, 3, 50, 101])
    kept, held = stratified(labels, share, np.random.default_rng(0))
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert set(labels[kept]) == set(labels)


def test_a_class_of_one_image_stays_in_training(tmp_path):
    x, _ = pictures(21, 2, (4, 4))
    np.savez(tmp_path / "d.npz", x_train=x, y_train=np.array([1] + [0] * 20))
    data = load_data(Data(source=str(tmp_path / "d.npz"), test=0.3, validation=0.3))
    assert 1 in data.train.labels
    assert 1 not in data.test.labels


def test_a_constant_channel_is_normalised_to_zero():
    mean, std = mean_and_std(np.full((3, 2, 2, 1), 51, np.uint8))
    assert mean == np.float32(0.2)
    assert std > 0


def test_mean_and_std_agree_with_numpy():
    images, _ = pictures(1500, 2, (3, 3, 3))
    mean, std = mean_and_std(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)), rtol=1e-6)


def test_splits_of_the_source_are_kept(tmp_path):
    x, y = pictures(40, 2, (4, 4))
    parts = {f"{a}_{what}": v[s] for what, s in (("train", slice(20)), ("val", slice(20, 30)), ("test", slice(30, 40)))
             for a, v in (("x", x), ("y", y))}  # fmt: skip
    np.savez(tmp_path / "d.npz", **parts, class_names=np.array(["cat", "dog"]))
    data = load_data(Data(source=str(tmp_path / "d.npz")))
    assert rows(data.train) == rows(Part(x[:20], y[:20]))
    assert rows(data.val) == rows(Part(x[20:30], y[20:30]))
    assert data.class_names == ("cat", "dog")


# -- npz


def test_float_images_are_rounded_to_bytes(tmp_path):
    x, y = pictures(40, 2, (4, 4))
    np.savez(tmp_path / "d.npz", x_train=(x / 255).astype(np.float16), y_train=y)
    data = load_data(Data(source=str(tmp_path / "d.npz")))
    assert rows(data.train, data.val, data.test) == rows(Part(x, y))


# -- image folders


def folder_of(path: Path, images: dict[str, np.ndarray]) -> Data:
    for name, image in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path / name)
    return Data(source=str(path), validation=0.5)


def grey(value: int = 0, shape: tuple[int, ...] = (4, 4), dtype: type = np.uint8) -> np.ndarray:
    return np.full(shape, value, dtype)


def six(prefix: str = "", **more: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{prefix}{c}/{i}.png": grey(10 * i) for c in "ab" for i in range(3)} | more


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders_are_used(tmp_path, val):
    config = folder_of(tmp_path, six("train/") | {f"{val}/a/x.png": grey(70), "test/b/y.jpeg": grey(90)})
    data = load_data(config)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 1, 1)
    assert data.val.images.max() == 70
    assert data.class_names == ("a", "b")
    assert data.image_shape == (4, 4, 1)


def test_a_class_may_be_called_train(tmp_path):
    images = {f"{c}/{i}.png": grey(i) for c in ("car", "train") for i in range(4)}
    assert load_data(folder_of(tmp_path, images)).class_names == ("car", "train")


def test_one_colour_image_makes_the_data_set_rgb(tmp_path):
    colour = grey(0, (4, 4, 4)) + np.array([200, 0, 0, 128], np.uint8)  # alpha is dropped
    data = load_data(folder_of(tmp_path, six() | {"a/c.png": colour}))
    assert data.image_shape == (4, 4, 3)
    assert rows(data.train, data.val, data.test)[-1] == (bytes([200, 0, 0] * 16), 0)


def test_sixteen_bit_and_one_bit_images_are_grey_bytes(tmp_path):
    images = six() | {"a/deep.png": grey(200 * 257, dtype=np.uint16), "a/bit.png": np.ones((4, 4), bool)}
    data = load_data(folder_of(tmp_path, images))
    values = {int(i.max()) for part in (data.train, data.val, data.test) for i in part.images}
    assert values == {0, 10, 20, 200, 255}
    assert data.image_shape == (4, 4, 1)


def test_exif_orientation_is_applied(tmp_path):
    config = folder_of(tmp_path, {f"{c}/{i}.png": grey(i, (4, 6)) for c in "ab" for i in range(3)})
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(grey(9, (6, 4))).save(tmp_path / "a" / "turned.jpg", exif=exif)
    assert load_data(config).image_shape == (4, 6, 1)


def test_images_of_many_sizes_are_read_with_image_size(tmp_path):
    folder_of(tmp_path, six() | {"a/large.png": grey(1, (9, 7))})
    assert load_data(Data(source=str(tmp_path), image_size=8, validation=0.5)).image_shape == (8, 8, 1)


# -- cifar, idx


def test_cifar_is_read_from_its_parent_and_from_its_archive(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    expected = load_data(Data(source=write_cifar(folder)[0])).digest
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    assert load_data(Data(source=str(tmp_path))).digest == expected
    assert load_data(Data(source=str(tmp_path / "cifar-10-binary.tar.gz"))).digest == expected


def test_cifar_100_has_fine_labels(tmp_path):
    source, whole = write_cifar(tmp_path, classes=100, label_bytes=2)
    data = load_data(Data(source=source))
    assert data.classes == 100
    assert rows(data.train, data.val, data.test) == rows(whole)


def test_idx_without_test_files_is_split(tmp_path):
    write_idx(tmp_path)
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    assert len(load_data(Data(source=str(tmp_path))).test) == 10


# -- real data, where it lies beside the project


def real(name: str) -> str:
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not beside the project (../shared/data)")
    return str(REAL / name)


def test_fashion_mnist_loads():
    data = load_data(Data(source=real("fashion_mnist.npz"), train_images=2000, test_images=500))
    assert isinstance(data, Dataset)
    assert (len(data.train), len(data.val), len(data.test)) == (1600, 400, 500)
    assert (data.image_shape, data.classes) == ((28, 28, 1), 10)
    assert 0.2 < data.mean[0] < 0.4


def test_real_cifar_10_images_load_from_batches(tmp_path):
    """The first 300 images of each set of ../shared/data/cifar10_jpeg.npz, written as batches."""
    pack, batches = np.load(real("cifar10_jpeg.npz")), {}
    for split, count in (("train", 300), ("test", 60)):
        headers, scans = pack[f"headers_{split}"].tobytes(), pack[f"scan_{split}"].tobytes()
        at, header_at, header = pack[f"off_{split}"], pack[f"header_off_{split}"], pack[f"hid_{split}"]
        labels = pack[f"y_{split}"]
        records = []
        for i in np.linspace(0, len(labels) - 1, count, dtype=int):  # the source lists them class by class
            start, end = header_at[header[i]], header_at[header[i] + 1]
            jpeg = headers[start:end] + scans[at[i] : at[i + 1]] + b"\xff\xd9"
            pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            records.append(bytes([labels[i]]) + pixels.transpose(2, 0, 1).tobytes())
        batches[split] = records
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}.bin").write_bytes(b"".join(batches["train"][i::5]))
    (tmp_path / "test_batch.bin").write_bytes(b"".join(batches["test"]))
    (tmp_path / "batches.meta.txt").write_text("\n".join(map(str, pack["classes"])))
    data = load_data(Data(source=str(tmp_path)))
    assert data.class_names[0] == "airplane"
    assert (len(data.train), len(data.val), len(data.test)) == (240, 60, 60)
    assert data.image_shape == (32, 32, 3)
