"""architecture.json: what was edited or damaged is refused in words, wherever it was."""

import json
from pathlib import Path

import pytest
import tiny

from nas.architecture import SCHEMA, Architecture, Input, load_architecture
from nas.errors import SpaceError


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Architecture:
    space = tiny.space(tmp_path_factory.mktemp("space"))
    return Architecture(SCHEMA, "x", space.decode(space.largest()), Input((8, 8, 1), (0.5,), (0.2,)), ("a", "b", "c"))


def op(document, kind):
    """The first op of a kind."""
    return next(o for b in document["network"]["blocks"] for o in b["graph"]["ops"] if o["op"] == kind)


def conv(**values):
    return lambda document: op(document, "conv").update(values)


def depthwise(**values):
    """The first depthwise convolution."""

    def change(document):
        ops = [o for b in document["network"]["blocks"] for o in b["graph"]["ops"]]
        next(o for o in ops if o.get("groups", 1) > 1).update(values)

    return change


def images(**values):
    return lambda document: document["input"].update(values)


DAMAGES = {
    "another stride": (conv(stride=3), r"op 0 \(conv\) gives shape \(3, 3, 4\), but \(4, 4, 4\) is written"),
    "another image size": (conv(shape=[5, 4, 4]), r"gives shape \(4, 4, 4\), but \(5, 4, 4\)"),
    "no shape": (conv(shape=[]), "features is None"),
    "other channels": (conv(shape=[4, 4, 6]), r"op 1 \(norm\) gives shape \(4, 4, 6\), but \(4, 4, 4\)"),
    "no channels": (conv(shape=[4, 4, 0]), "features is 0"),
    "kernel 0": (conv(kernel=0), "kernel is 0"),
    "an even kernel": (conv(kernel=2), "kernel 2 is even"),
    "stride 0": (conv(stride=0), "stride is 0"),
    "groups 0": (conv(groups=0), "groups is 0"),
    "groups that do not divide": (depthwise(groups=3), "do not divide into 3 groups"),
    "a window without steps": (lambda d: op(d, "pool").update(window=3, stride=0), "stride is 0"),
    "too many inputs": (conv(inputs=[0, 0]), "reads 1 value, not 2"),
    "no input": (conv(inputs=[]), "do not exist yet"),
    "a value of the future": (conv(inputs=[1]), "do not exist yet"),
    "a negative value": (conv(inputs=[-1]), "do not exist yet"),
    "a weight twice": (depthwise(name="expand"), "two ops have the weights"),
    "images of no height": (images(shape=[0, 8, 1]), "image shape"),
    "images of another size": (images(shape=[16, 16, 1]), "image shape"),
    "std 0": (images(std=[0.0]), "std is .*above 0"),
    "std below 0": (images(std=[-0.2]), "std is .*above 0"),
    "a mean too many": (images(mean=[0.5, 0.5]), "mean is .*one a channel"),
    "no std": (images(std=[]), "std is .*one a channel"),
    "a class too many": (lambda d: d["classes"].append("d"), "number of classes is 4"),
}


def stored(folder: Path, made: Architecture, change=lambda document: None) -> Path:
    document = json.loads(made.to_json())
    change(document)
    path = folder / "architecture.json"
    path.write_text(json.dumps(document))
    return path


def test_what_was_not_changed_is_loaded(tmp_path, made):
    assert load_architecture(stored(tmp_path, made)) == made


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_told_in_a_paragraph(tmp_path, made, damage):
    change, message = DAMAGES[damage]
    with pytest.raises(SpaceError, match=message) as told:
        load_architecture(stored(tmp_path, made, change))
    assert str(told.value).startswith(str(tmp_path / "architecture.json"))
    assert "\n" not in str(told.value)
