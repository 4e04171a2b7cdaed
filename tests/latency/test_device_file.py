import pytest

from nas import catalog
from nas.errors import ConfigError, DeviceError
from nas.latency import load_device


@pytest.mark.parametrize("name", catalog.list_devices())
def test_every_device_that_comes_along_loads(name):
    assert load_device(name).precision


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(DeviceError, match=r"Did you mean `host_onnxruntime`"):
        load_device("host_onnxruntimes")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('device = "x"\nruntime = "onnxruntime"\nthread = 2\n', r"line 3: unknown key `thread`.*`threads`"),
        ('device = "x"\nruntime = "onnxruntime"\nthreads = 0\n', "line 3: `threads` is 0"),
        ('device = "x"\nruntime = "onnxruntime"\nprecision = []\n', "line 3: `precision` is empty"),
        ('device = "x"\n', "`runtime` is missing"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, text, message):
    (tmp_path / "device.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_device(str(tmp_path))
