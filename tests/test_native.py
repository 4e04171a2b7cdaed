"""The C++ kernels equal the sums they stand for, on any number of threads and devices, and are missed by nobody."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from nas import kernels, native
from nas.errors import DeviceError
from nas.native import build

ROOT = Path(__file__).resolve().parents[1]
OFF = os.environ.get("NAS_NATIVE") == "0"
CLONE_MISSING = {"avx2"} - {"avx2" if "avx" in native.status() else ""}
needs_library = pytest.mark.skipif(not native.available(), reason=native.status())


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def run(program, timeout=120, **environment):
    """What a Python process of its own prints, the package being that of this checkout."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reference(x, w, stride, g=None):
    """Convolution and, for the gradient `g` of its outputs, those of `x` and `w`, tap by tap in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    (n, height, width, c), (kh, kw) = x.shape, w.shape[:2]
    rows, columns = kernels.same_padding(height, kh, stride), kernels.same_padding(width, kw, stride)
    padded = np.pad(x, ((0, 0), rows, columns, (0, 0)))
    y = np.zeros((n, -(-height // stride), -(-width // stride), c))
    g = np.zeros_like(y) if g is None else g.astype(np.float64)
    dx, dw = np.zeros_like(padded), np.zeros_like(w)
    for i in range(kh):
        for j in range(kw):
            down = slice(i, i + (y.shape[1] - 1) * stride + 1, stride)
            seen = np.s_[:, down, j : j + (y.shape[2] - 1) * stride + 1 : stride]
            y += padded[seen] * w[i, j, 0]
            dx[seen] += g * w[i, j, 0]
            dw[i, j, 0] = (padded[seen] * g).sum((0, 1, 2))
    return y, dx[:, rows[0] : rows[0] + height, columns[0] : columns[0] + width], dw


def with_gradients(x, w, g, stride):
    y, pull = jax.vjp(lambda x, w: native.depthwise(x, w, stride), x, w)
    return y, *pull(g)


def assert_close(actual, expected, tolerance=2e-6):
    """Each within `tolerance` of the largest expected value."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-3))


@pytest.mark.skipif(OFF, reason="NAS_NATIVE=0")
def test_where_there_is_a_compiler_there_is_a_library():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert native.available(), native.status()
    assert native.status().startswith("in use")


@needs_library
@pytest.mark.parametrize("channels", [*range(1, 20), 23, 24, 31, 32, 33, 40, 47, 48, 63, 64, 65, 72, 100, 130])
def test_no_channel_is_forgotten(channels):
    x, w, g = draw(channels, (2, 5, 6, channels), (3, 3, 1, channels), (2, 5, 6, channels))
    assert_close(with_gradients(x, w, g, 1), reference(x, w, 1, g))


@needs_library
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("geometry", [((9, 12), (3, 5), 1), ((4, 4), (7, 7), 2), ((11, 2), (4, 1), 3)], ids=str)
def test_no_image_is_forgotten(batch, geometry):
    size, kernel, stride = geometry
    outputs = [-(-s // stride) for s in size]
    x, w, g = draw(batch, (batch, *size, 5), (*kernel, 1, 5), (batch, *outputs, 5))
    assert_close(with_gradients(x, w, g, stride), reference(x, w, stride, g))


@needs_library
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 100, 130])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (40, 16, 16)])
def test_channel_sums_count_every_pixel_of_every_channel_once(channels, size):
    a, b = draw(channels, (*size, channels), (*size, channels))
    a_shift, b_shift = draw(channels + 1, (channels,), (channels,))
    shifted = a.astype(np.float64) - a_shift
    expected = np.stack([shifted.sum((0, 1, 2)), (shifted * (b.astype(np.float64) - b_shift)).sum((0, 1, 2))])
    size_of_terms = np.abs(shifted).sum((0, 1, 2)).max()
    np.testing.assert_allclose(native.channel_sums(a, b, a_shift, b_shift), expected, atol=1e-6 * size_of_terms)


@needs_library
def test_channel_sums_differentiate():
    a, b, weights = draw(0, (2, 3, 3, 5), (2, 3, 3, 5), (2, 5))
    shifts = draw(1, (5,), (5,))

    def written_out(a, b, a_shift, b_shift):
        return (weights[0] * (a - a_shift) + weights[1] * (a - a_shift) * (b - b_shift)).sum()

    ours = jax.grad(lambda *x: (weights * native.channel_sums(*x)).sum(), (0, 1, 2, 3))(a, b, *shifts)
    assert_close(ours, jax.grad(written_out, (0, 1, 2, 3))(a, b, *shifts))


@needs_library
@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 4, 4, 0)])
def test_nothing_gives_nothing(shape):
    x, w = np.zeros(shape, np.float32), np.ones((3, 3, 1, shape[-1]), np.float32)
    y, dx, dw = with_gradients(x, w, x, 1)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dw, np.zeros_like(w))
    np.testing.assert_array_equal(native.channel_sums(x, x, w[0, 0, 0], w[0, 0, 0]), np.zeros((2, shape[-1])))


@needs_library
def test_a_channel_does_not_depend_on_those_beside_it():
    x, w, g = draw(0, (3, 6, 6, 70), (5, 5, 1, 70), (3, 6, 6, 70))
    whole = with_gradients(x, w, g, 1)
    for channels in (1, 3, 6, 13, 20, 37, 64):
        for part, all_ in zip(with_gradients(*(a[..., :channels] for a in (x, w, g)), 1), whole, strict=True):
            np.testing.assert_array_equal(part, all_[..., :channels])


@needs_library
@pytest.mark.parametrize("stride", [1, 2])
def test_it_differentiates_twice(stride):
    outputs, (size, kernel) = (2, -(-5 // stride), -(-4 // stride), 3), ((5, 4), (3, 3))
    x, w, g = draw(stride, (2, *size, 3), (*kernel, 1, 3), outputs)
    y, dx, dw = reference(x, w, stride, g)

    value, pull = jax.vjp(lambda g, w: native.input_gradient(g, w, stride, size), g, w)
    assert_close([value, *pull(x)], [dx, y, dw])
    value, pull = jax.vjp(lambda x, g: native.weight_gradient(x, g, stride, kernel), x, g)
    assert_close([value, *pull(w)], [dw, dx, y])


THREADS = """
import hashlib, threading
import jax, numpy as np
from nas import native

rng = np.random.default_rng(0)
shapes = [(8, 12, 40, 5, 1), (9, 7, 70, 3, 2), (5, 4, 33, 7, 1), (1, 20, 16, 3, 2)] * 8
arrays = [
    (rng.normal(size=(n, size, size, c)).astype(np.float32), rng.normal(size=(k, k, 1, c)).astype(np.float32))
    for n, size, c, k, _ in shapes
]

@jax.jit
def program(arrays):  # so many independent calls that XLA makes them from all threads of its pool at once
    def loss(x, w, stride):
        y = native.depthwise(x, w, stride)
        ones = np.ones(w.shape[-1], np.float32)
        return (native.channel_sums(y, jax.lax.stop_gradient(y), ones, ones) ** 2).sum()

    return [jax.grad(loss, (0, 1))(x, w, shape[-1]) for (x, w), shape in zip(arrays, shapes)]

def digest():
    return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(program(arrays)))).hexdigest()

expected, found = digest(), []
callers = [threading.Thread(target=lambda: found.extend(digest() for _ in range(40))) for _ in range(6)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert found == [expected] * 240, set(found)
print(expected)
"""


@needs_library
def test_many_callers_never_wait_for_each_other_and_the_bits_do_not_depend_on_the_threads():
    assert len({run(THREADS, NPROC=str(threads)) for threads in (1, 2, 4)}) == 1  # NPROC: the size of XLA's pool


CLONE = """
import jax, numpy as np
from nas import native

saved = np.load({path!r})
assert native.status() == "in use, {clone} instructions", native.status()
for stride in (1, 2):
    x, w, g = (saved[f"{{name}}{{stride}}"] for name in "xwg")
    y, pull = jax.vjp(lambda x, w: native.depthwise(x, w, stride), x, w)
    for name, value in zip(("y", "dx", "dw", "sums"), (y, *pull(g), native.channel_sums(y, g, *w[0, :2, 0]))):
        expected = saved[f"{{name}}{{stride}}"]
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
"""


@needs_library
@pytest.mark.parametrize("clone", ["baseline", "avx2"])
def test_narrower_clones_compute_the_same(clone, tmp_path):
    if clone in CLONE_MISSING:
        pytest.skip(f"this machine has no {clone}")
    saved = {}
    for stride in (1, 2):
        x, w, g = draw(stride, (5, 9, 8, 43), (5, 3, 1, 43), (5, -(-9 // stride), -(-8 // stride), 43))
        y, dx, dw = reference(x, w, stride, g)
        shifted = y - w[0, 0, 0]
        sums = np.stack([shifted.sum((0, 1, 2)), (shifted * (g - w[0, 1, 0])).sum((0, 1, 2))])
        named = {"x": x, "w": w, "g": g, "y": y, "dx": dx, "dw": dw, "sums": sums}
        saved |= {f"{name}{stride}": array for name, array in named.items()}
    path = tmp_path / "saved.npz"
    np.savez(path, **saved)
    run(CLONE.format(path=str(path), clone=clone), NAS_NATIVE=clone)


SHARDED = """
import jax, numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from nas import native

rng = np.random.default_rng(0)
x = rng.normal(size=(8, 7, 6, 12)).astype(np.float32)
w = rng.normal(size=(2, 3, 3, 1, 12)).astype(np.float32)

def loss(w, x):
    branches = [lambda x, w, k=k: native.depthwise(x, w[:k, :k], 1) for k in (1, 2, 3)]
    x = lax.switch((w[0, 0, 0, 0, 0] < 9).astype(int) * 2, branches, x, w[0])  # as in a supernet
    total, squares = native.channel_sums(x, x, w[0, 0, 0, 0], w[0, 0, 0, 0])
    return (native.depthwise(x, w[1], 2) ** 2).sum() + (3 * total + squares).sum()

step = jax.value_and_grad(loss, (0, 1))
expected = jax.tree.leaves(jax.jit(step)(w, x))

def check(step, w, x):
    program = jax.jit(step).lower(w, x).compile()
    assert "all-gather" not in program.as_text()
    for a, b in zip(jax.tree.leaves(program(w, x)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    return program

mesh = Mesh(np.array(jax.devices()).reshape(4), ("data",))
split = lambda a, mesh, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))

# by image: each device its own, and one sum over devices for each weight gradient
program = check(step, split(w, mesh), split(x, mesh, "data"))
assert program(split(w, mesh), split(x, mesh, "data"))[1][1].sharding.spec[0] == "data"

# by channel, and by both
check(step, split(w, mesh, None, None, None, None, "data"), split(x, mesh, None, None, None, "data"))
both = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
check(step, split(w, both, None, None, None, None, "model"), split(x, both, "data", None, None, "model"))

# by row, which the rules do not know: gathered, and right
tall, forward = x.reshape(4, 12, 7, 12), jax.jit(lambda x: native.depthwise(x, w[0], 1))
by_row = forward(split(tall, mesh, None, "data"))
np.testing.assert_allclose(by_row, forward(tall), rtol=0, atol=1e-6)

# shard_map: each device sees its own images only
def local(w, x):
    value, (dw, dx) = jax.value_and_grad(loss, (0, 1))(w, x)
    return lax.psum(value, "data"), (lax.psum(dw, "data"), dx)

mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), (P(), P("data"))), check_vma=False)
check(mapped, split(w, mesh), split(x, mesh, "data"))
print("done")
"""


@needs_library
def test_each_device_convolves_its_own_images():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    assert run(SHARDED, XLA_FLAGS=flags).endswith("done\n")


@pytest.fixture
def not_loaded(monkeypatch):
    """As in a new process: whether the library can be used is asked again, during the test and after it."""
    native._problem.cache_clear()
    native._library.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._problem.cache_clear()
    native._library.cache_clear()


def test_nas_native_0_declines(not_loaded):
    not_loaded.setenv("NAS_NATIVE", "0")
    assert build.compiler() is None
    assert not native.available()
    assert native.status() == "not in use: NAS_NATIVE=0 is set."


def test_a_damaged_library_is_not_used(not_loaded, tmp_path):
    not_loaded.setenv("NAS_NATIVE", "1")
    not_loaded.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    build.LIBRARY.write_bytes(b"no library")
    assert native.status().startswith(f"not in use: {build.LIBRARY} cannot be loaded")
    with pytest.raises(DeviceError, match="cannot be loaded"):
        native.depthwise(np.zeros((1, 2, 2, 1), np.float32), np.zeros((1, 1, 1, 1), np.float32), 1)


def test_a_library_that_was_never_built_is_missed_by_nobody(not_loaded, tmp_path):
    not_loaded.setenv("NAS_NATIVE", "1")
    not_loaded.setattr(build, "LIBRARY", tmp_path / "kernels.so")
    assert native.status().startswith("not built")
    x, w = draw(2, (1, 4, 4, 2), (3, 3, 1, 2))
    assert_close([kernels.depthwise(x, w)], [reference(x, w, 1)[0]])


@needs_library
def test_a_library_of_another_source_is_not_used(not_loaded):
    not_loaded.setattr(build, "source_hash", lambda: "another")
    assert native.status().startswith("not in use: compiled from another kernels.cc")


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler", f"{sys.executable} -c 'import sys; sys.exit(3)'"])
def test_a_compiler_that_fails_leaves_what_was_there(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("NAS_NATIVE", "1")
    library = tmp_path / "kernels.so"
    library.write_text("of last time")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "LIBRARY", library)
    with pytest.raises(build.BuildError):
        build.build()
    assert library.read_text() == "of last time"
    assert list(tmp_path.iterdir()) == [library]


def test_nothing_ties_the_library_to_this_machine():
    assert not [flag for flag in build.FLAGS if flag.startswith(("-march", "-mcpu", "-mtune", "-mavx", "-mfma"))]


@pytest.mark.slow
@pytest.mark.parametrize("with_compiler", [False, True])
def test_a_wheel_holds_the_library_if_there_is_a_compiler_and_its_platform_if_it_does(with_compiler, tmp_path):
    if with_compiler and build.compiler() is None:
        pytest.skip("no C++ compiler")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(words, check=True, env=os.environ | {"NAS_NATIVE": "1", "CXX": "" if with_compiler else "absent"})
    (wheel,) = tmp_path.glob("*.whl")
    assert ("nas/native/kernels.so" in zipfile.ZipFile(wheel).namelist()) == with_compiler
    assert wheel.name.endswith("-py3-none-any.whl") != with_compiler
