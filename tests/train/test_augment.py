"""Augmentation: Pillow's operations to the level, the published draws, and exact shares of what is mixed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from nas import kernels
from nas.config import Augment, Data
from nas.data import load_data
from nas.errors import ConfigError, DataError
from nas.train.augment import OPERATIONS, POLICIES, augment, cutout, flip, mix, policies, shift
from nas.train.augment.operations import UNCOVERED

QUICKLY = {"xla_backend_optimization_level": 0}  # nearly all the time of these tests is spent compiling
SHAPES = [(28, 28, 1), (32, 32, 3), (20, 12, 3)]


def affine(*matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, matrix)


# operation -> what Pillow calls it, given the argument, and arguments to try
PILLOW = {
    "identity": (lambda _: lambda im: im, [0]),
    "auto_contrast": (lambda _: ImageOps.autocontrast, [0]),
    "equalize": (lambda _: ImageOps.equalize, [0]),
    "invert": (lambda _: ImageOps.invert, [0]),
    "solarize": (lambda v: lambda im: ImageOps.solarize(im, v), [256, 255, 128, 51, 0]),
    "posterize": (lambda v: lambda im: ImageOps.posterize(im, v), [8, 7, 4, 1]),
    "color": (lambda v: lambda im: ImageEnhance.Color(im).enhance(v), [0, 0.19, 1, 1.81]),
    "contrast": (lambda v: lambda im: ImageEnhance.Contrast(im).enhance(v), [0, 0.19, 1, 1.81]),
    "brightness": (lambda v: lambda im: ImageEnhance.Brightness(im).enhance(v), [0, 0.19, 1, 1.81]),
    "sharpness": (lambda v: lambda im: ImageEnhance.Sharpness(im).enhance(v), [0, 0.19, 1, 1.81]),
    "shear_x": (lambda v: affine(1, v, 0, 0, 1, 0), [0, 0.27, -0.27, 0.3]),
    "shear_y": (lambda v: affine(1, 0, 0, v, 1, 0), [0, 0.27, -0.27, 0.3]),
    "translate_x": (lambda v: lambda im: affine(1, 0, v * im.width, 0, 1, 0)(im), [0, 0.1, -9 / 32, 0.31]),
    "translate_y": (lambda v: lambda im: affine(1, 0, 0, 0, 1, v * im.height)(im), [0, 0.1, -9 / 32, 0.31]),
    "rotate": (lambda v: lambda im: im.rotate(v), [0, 6, 27, -27, 30]),
}


@functools.cache
def pictures(shape):
    """uint8 [n, *shape]: noise, a dark ramp, one level, two levels, and digits."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    ramp = np.linspace(20, 140, height * width * channels).reshape(shape)
    digits = load_data(Data(source="digits")).train.images[:3, ..., 0]
    drawn = [np.asarray(Image.fromarray(d).resize((width, height), Image.Resampling.BILINEAR)) for d in digits]
    tinted = [d[..., None] * np.linspace(1, 0.4, channels) for d in drawn]
    out = [rng.integers(0, 256, shape), ramp, np.full(shape, 77), rng.choice([30, 31], shape), *tinted]
    return np.stack([np.asarray(x, np.uint8) for x in out])


def by_pillow(change, picture):
    grey = picture.shape[-1] == 1
    out = np.asarray(change(Image.fromarray(picture[..., 0] if grey else picture)))
    return out.reshape(picture.shape)


def unit(pictures):
    return jnp.asarray(pictures, jnp.float32) / 255


def levels(images):
    return np.rint(np.asarray(images, np.float64) * 255).astype(int)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_pillows(name, shape):
    make, arguments = PILLOW[name]
    operation = jax.jit(jax.vmap(OPERATIONS[name], (0, None)), compiler_options=QUICKLY)
    for argument in arguments:
        ours = np.asarray(operation(pictures(shape).astype(np.float32), np.float32(argument)))
        ours = np.where(ours == UNCOVERED, 0, ours)  # Pillow's fill
        assert np.array_equal(ours, ours.clip(0, 255).round())
        theirs = np.stack([by_pillow(make(argument), p) for p in pictures(shape)])
        assert np.abs(ours - theirs).max() <= 1, argument


def test_operations_are_applied_in_order_each_image_its_own():
    shape = (20, 12, 3)
    chains = [("rotate", "equalize"), ("equalize", "rotate"), ("invert", "solarize"), ("identity", "sharpness")]
    value = {"rotate": 12.0, "solarize": 100.0, "sharpness": 1.6}
    picture = pictures(shape)[0]
    index = [[list(OPERATIONS).index(name) for name in chain] for chain in chains]
    arguments = [[value.get(name, 0.0) for name in chain] for chain in chains]
    images = unit(np.stack([picture] * len(chains)))
    out = policies.apply(images, jnp.asarray(index), jnp.asarray(arguments), jnp.zeros(3))
    for got, chain in zip(levels(out), chains, strict=True):
        wanted = picture
        for name in chain:
            wanted = by_pillow(PILLOW[name][0](int(value[name]) if name == "solarize" else value.get(name)), wanted)
        assert np.abs(got - wanted).max() <= 1


def test_uncovered_pixels_are_filled():
    index = jnp.full((1, 1), list(OPERATIONS).index("translate_x"))
    images = unit(pictures((20, 12, 3))[:1])
    out = levels(policies.apply(images, index, jnp.full((1, 1), 0.5), jnp.asarray([0.2, 0.5, 1.0])))
    np.testing.assert_array_equal(out[:, :, :6], levels(images)[:, :, 6:])
    np.testing.assert_array_equal(np.unique(out[:, :, 6:].reshape(-1, 3), axis=0), [[51, 128, 255]])


SETTINGS = {
    "flip": Augment(flip=True),
    "shift": Augment(shift=3),
    "cutout": Augment(cutout=6),
    "randaugment": Augment(policy="randaugment"),
    "autoaugment": Augment(policy="autoaugment"),
    "all": Augment(flip=True, shift=2, policy="randaugment", operations=3, magnitude=5, cutout=4),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_augmentation_depends_on_the_key_alone_and_is_compiled_once(name, shape):
    images = unit(np.stack([pictures(shape)[0]] * 32))
    function = jax.jit(lambda key, images: augment(key, images, SETTINGS[name]), compiler_options=QUICKLY)
    first, again, other = (np.asarray(function(jax.random.key(k), images)) for k in (1, 1, 2))
    assert function._cache_size() == 1
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    assert first.shape == images.shape
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert len({image.tobytes() for image in first}) >= (2 if name == "flip" else 10)  # each image its own


def test_both_forms_of_a_policy_agree(monkeypatch):
    images = unit(pictures((20, 12, 3)))
    settings = Augment(policy="randaugment", operations=3)
    out = []
    for cpu in (True, False):
        monkeypatch.setattr(kernels, "on_cpu", lambda cpu=cpu: cpu)
        function = jax.jit(lambda key, images: augment(key, images, settings), compiler_options=QUICKLY)
        out.append(levels(function(jax.random.key(5), images)))
    np.testing.assert_array_equal(*out)


def test_nothing_asked_for_is_nothing_done():
    images = unit(pictures((20, 12, 3))) + 0.123  # of no 256 levels
    for settings in (Augment(), Augment(policy="randaugment", operations=0)):
        assert augment(jax.random.key(0), images, settings) is images


@pytest.mark.parametrize("name", sorted(policies.RANDAUGMENT.keys() - {"auto_contrast", "equalize"}))
def test_magnitude_zero_changes_nothing(name):
    picture = pictures((28, 28, 1))[0].astype(np.float32)
    centre, reach = policies.RANDAUGMENT[name](0)
    assert reach == 0
    np.testing.assert_array_equal(OPERATIONS[name](jnp.asarray(picture), jnp.float32(centre)), picture)


@pytest.mark.parametrize("settings", [SETTINGS["all"], SETTINGS["autoaugment"]], ids=["all", "autoaugment"])
def test_the_type_of_images_is_kept(settings):
    images = unit(pictures((28, 28, 1))).astype(jnp.bfloat16)
    assert jax.eval_shape(lambda x: augment(jax.random.key(0), x, settings), images).dtype == jnp.bfloat16


def drawn(monkeypatch, policy, settings, n):
    """(operation names, arguments), each [n, k], that the policy draws for n images."""
    monkeypatch.setattr(policies, "apply", lambda images, operations, arguments, fill: (operations, arguments))
    operations, arguments = POLICIES[policy](jax.random.key(0), jnp.zeros((n, 1, 1, 1)), settings, jnp.zeros(1))
    return np.asarray(list(OPERATIONS))[np.asarray(operations)], np.asarray(arguments)


def assert_share(mask, expected):
    """Within four standard deviations of a binomial share."""
    assert np.mean(mask) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / np.size(mask)) ** 0.5 + 1e-9)


def test_randaugment_draws_its_operations_alike_at_one_magnitude(monkeypatch):
    names, arguments = drawn(monkeypatch, "randaugment", Augment(operations=3, magnitude=9), 20_000)
    assert names.shape == (20_000, 3)
    assert len(policies.RANDAUGMENT) == 14
    for name, scale in policies.RANDAUGMENT.items():
        assert_share(names == name, 1 / 14)
        centre, reach = scale(9)
        values = arguments[names == name]
        np.testing.assert_allclose(np.unique(values), sorted({centre - reach, centre + reach}), rtol=1e-6)
        if reach:
            assert_share(values > centre, 0.5)
    assert_share((names[:, 0] == "rotate") & (names[:, 1] == "rotate"), 1 / 14**2)


def test_autoaugment_draws_its_subpolicies_alike_and_their_operations_as_published(monkeypatch):
    table = policies.CIFAR10_SUBPOLICIES
    assert len(table) == 25
    n = 50_000
    names, arguments = drawn(monkeypatch, "autoaugment", Augment(), n)
    for place, name in itertools.product((0, 1), policies.AUTOAUGMENT):
        rows = [(p, level) for sub in table for op, p, level in [sub[place]] if op == name]
        assert_share(names[:, place] == name, sum(p for p, _ in rows) / 25)
        values = {c + s * r for p, level in rows if p for c, r in [policies.AUTOAUGMENT[name](level)] for s in (-1, 1)}
        seen = np.unique(arguments[:, place][names[:, place] == name])
        np.testing.assert_allclose(seen, np.unique(np.float32(sorted(values))), rtol=1e-5)
    both = sum(a[1] * b[1] for a, b in table if (a[0], b[0]) == ("translate_y", "auto_contrast"))
    assert_share((names[:, 0] == "translate_y") & (names[:, 1] == "auto_contrast"), both / 25)


@pytest.mark.parametrize(
    ("name", "level", "centre", "reach"),
    [  # by hand, from the authors' code
        ("rotate", 2, 0, 6),
        ("translate_x", 9, 0, 9 / 32),
        ("shear_y", 8, 0, 0.24),
        ("posterize", 7, 2, 0),
        ("solarize", 8, 52, 0),
        ("solarize", 5, 128, 0),
        ("sharpness", 1, 0.28, 0),
        ("color", 0, 0.1, 0),
    ],
)
def test_autoaugments_levels(name, level, centre, reach):
    assert policies.AUTOAUGMENT[name](level) == pytest.approx((centre, reach))


def test_half_of_the_images_are_mirrored():
    images = jax.random.uniform(jax.random.key(0), (4000, 2, 3, 1))
    out = np.asarray(flip(jax.random.key(1), images))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert np.all(mirrored | (out == images).all((1, 2, 3)))
    assert_share(mirrored, 0.5)


def test_a_shift_is_every_crop_of_the_padded_image_equally_often():
    image = np.arange(1, 25, dtype=np.float32).reshape(4, 3, 2)
    out = np.asarray(shift(jax.random.key(0), jnp.asarray(np.stack([image] * 4000)), 1))
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    for top, left in itertools.product(range(3), range(3)):
        crop = padded[top : top + 4, left : left + 3]
        assert_share((out == crop).all((1, 2, 3)), 1 / 9)


@pytest.mark.parametrize(("size", "side"), [((10, 8), 4), ((10, 8), 3), ((6, 6), 20)])
def test_cutout_blanks_a_square_around_any_pixel(size, side):
    fill = np.float32([0.25, 0.75])
    out = np.asarray(cutout(jax.random.key(0), jnp.ones((8000, *size, 2)), side, fill))
    blank = (out == fill).all(-1)
    assert np.all(blank | (out == 1).all(-1))
    assert blank.any((1, 2)).all()
    for row, column in itertools.product(range(size[0]), range(size[1])):
        near = [
            sum(0 <= place - (centre - side // 2) < side for centre in range(pixels)) / pixels
            for place, pixels in ((row, size[0]), (column, size[1]))
        ]
        assert_share(blank[:, row, column], near[0] * near[1])
    assert blank.sum((1, 2)).max() == min(side, size[0]) * min(side, size[1])


# Image i is constant i + 1 and the only one of its class, so that the result says what it was made of.
N = 8
OWN = jnp.broadcast_to(jnp.arange(1.0, N + 1)[:, None, None, None], (N, 6, 5, 1))


@functools.cache
def mixtures(**settings):
    """Images [2000, N, 30 pixels] and targets [2000, N, N] of so many mixed batches."""
    function = jax.jit(jax.vmap(lambda key: mix(key, OWN, jnp.eye(N), Augment(**settings))), compiler_options=QUICKLY)
    images, targets = function(jax.random.split(jax.random.key(0), 2000))
    return np.asarray(images, np.float64).reshape(2000, N, -1), np.asarray(targets, np.float64)


@pytest.mark.parametrize("settings", [{"mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 0.3, "cutmix": 1.0}], ids=str)
def test_targets_are_mixed_in_the_shares_of_the_images(settings):
    images, targets = mixtures(**settings)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(images.mean(-1), targets @ np.arange(1, N + 1), atol=1e-5)
    own = np.diagonal(targets, axis1=1, axis2=2)
    partner = (targets - own[..., None] * np.eye(N)).argmax(-1)
    assert set(np.unique(partner)) == set(range(N))
    assert len(np.unique(own.min(1).round(6))) > 10  # another share in every batch
    share = own.min(1, keepdims=True)  # one for a batch, but 1 where an image meets itself
    np.testing.assert_allclose(np.where(own < 1 - 1e-6, own, share), np.broadcast_to(share, own.shape), atol=1e-6)


def test_mixup_weighs_by_beta_and_cutmix_keeps_whole_pixels():
    images, targets = mixtures(mixup=0.3)
    np.testing.assert_allclose(np.ptp(images, axis=-1), 0, atol=1e-6)
    own = np.diagonal(targets, axis1=1, axis2=2).min(1)
    assert own.mean() == pytest.approx(0.5, abs=0.03)
    assert own.var() == pytest.approx(1 / (4 * 1.6), abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))
    images, targets = mixtures(cutmix=1.0)
    np.testing.assert_array_equal(images, images.round())
    kept = np.diagonal(targets, axis1=1, axis2=2) * 30
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)


def test_with_both_each_is_drawn_for_half_of_the_batches():
    images, _ = mixtures(mixup=0.3, cutmix=1.0)
    assert_share((images == images.round()).all((1, 2)), 0.5)


def test_nothing_to_mix_gives_back_the_arguments():
    images, targets = mix(jax.random.key(0), OWN, jnp.eye(N), Augment(flip=True))
    assert images is OWN
    assert targets.shape == (N, N)


def test_wrong_use_is_told():
    with pytest.raises(ConfigError, match="Did you mean `randaugment`"):
        augment(jax.random.key(0), OWN, Augment(policy="rand_augment"))
    with pytest.raises(DataError, match="these have 2: convert"):
        augment(jax.random.key(0), jnp.zeros((4, 8, 8, 2)), Augment(policy="autoaugment"))
    with pytest.raises(DataError, match="one_hot"):
        mix(jax.random.key(0), OWN, jnp.zeros(N, int), Augment(mixup=1.0))
