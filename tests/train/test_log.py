"""The log of a training: what is kept on resume, TensorBoard's events, and the trace."""

import importlib.util
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas.data import Part
from nas.errors import RunError
from nas.train import fit
from nas.train.log import Events, Log, require_tensorboard
from nas.train.profile import WARMUP_STEPS, Profile


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_keeps_what_the_checkpoint_knows_and_only_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Log(path, 0) as log:
        for step in (1, 2, 3):
            log.append({"step": step, "loss": 0.5})
            assert len(rows(path)) == step  # on the disk at once
    path.write_text(path.read_text() + '{"step": 2, "lo')  # torn
    with Log(path, 2) as log:
        assert rows(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
        before = path.stat().st_ino
        log.append({"step": 3, "loss": 0.25})
        assert path.stat().st_ino == before
    text = path.read_bytes()
    with Log(path, 3):
        assert path.stat().st_ino == before  # nothing to drop, so nothing is rewritten
    assert path.read_bytes() == text
    path.write_bytes(b'3\n[]\n{"loss": 1}\nnonsense\n' + text)
    with Log(path, 9):
        assert path.read_bytes() == text


def read_events(path) -> list:
    """The records of an event file: length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, events = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event()
        event.ParseFromString(data[at + 12 : at + 12 + length])
        events.append(event)
        at += 12 + length + 4
    return events


def shown(folder) -> dict[tuple[str, int], list[float]]:
    """Scalars by (tag, step), as TensorBoard shows them: a session that starts at a step hides what is later."""
    from tensorboardX.proto.event_pb2 import SessionLog

    out: dict[tuple[str, int], list[float]] = {}
    for path in sorted(folder.iterdir()):
        events = read_events(path)
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                out = {(tag, step): v for (tag, step), v in out.items() if step < event.step}
            for value in event.summary.value:
                out.setdefault((value.tag, event.step), []).append(value.simple_value)
    return out


PART = Part(np.arange(64, dtype=np.uint8).reshape(64, 1, 1, 1), np.zeros(64, np.int32))


@jax.jit
def _compiled(state, images):
    w = state["w"] * 0.9 + images.mean()
    return {"w": w}, {"loss_largest": w.sum(), "gradient_norm": w.max()}


def train(folder, steps=40, stop_at=None, **options):
    def step(state, number, images, labels):
        if number == stop_at:
            raise KeyboardInterrupt
        return _compiled(state, images)

    state = {"w": jnp.ones(4)}
    return fit(step, state, PART, steps=steps, batch_size=8, seed=0, folder=folder, log_steps=5, **options)


def test_events_are_the_rows_of_the_log_and_no_step_appears_twice_after_a_resume(tmp_path):
    options = {"tensorboard": True, "checkpoint_steps": 10, "learning_rate": lambda step: 0.5 / (step + 1)}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=18, **options)
    assert {step for _, step in shown(tmp_path / "events")} == {5, 10, 15}
    train(tmp_path, **options)
    wanted = {(k, row["step"]): [pytest.approx(v)] for row in rows(tmp_path / "metrics.jsonl") for k, v in row.items()}
    wanted = {key: value for key, value in wanted.items() if key[0] != "step"}
    assert shown(tmp_path / "events") == wanted
    tags = {"loss_largest", "gradient_norm", "learning_rate", "images_per_second", "waiting"}
    assert {tag for tag, _ in wanted} == tags
    assert wanted["learning_rate", 40] == [0.5 / 40]
    assert len(list((tmp_path / "events").iterdir())) == 2


def test_without_tensorboardx_the_line_that_brings_it_is_told(tmp_path, monkeypatch):
    require_tensorboard()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"pip install 'tensorboardX"):
        Events(tmp_path / "events", 0)


@pytest.mark.parametrize(
    ("count", "start", "stop", "traced"),
    [
        (5, 0, 100, range(WARMUP_STEPS, WARMUP_STEPS + 5)),
        (5, 40, 100, range(40 + WARMUP_STEPS, 45 + WARMUP_STEPS)),
        (5, 0, 8, range(3, 8)),
        (5, 92, 100, range(95, 100)),
        (5, 98, 100, range(98, 100)),
        (5, 100, 100, range(100, 100)),
    ],
)
def test_the_traced_steps_come_after_those_that_compile_where_there_is_room(tmp_path, count, start, stop, traced):
    assert Profile(tmp_path, count, start=start, stop=stop).steps == traced


def test_a_trace_is_written_by_every_call_that_asks_and_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain")
    train(tmp_path / "run", steps=20, checkpoint_steps=10, profile_steps=3)
    [trace] = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    trace.parent.rename(trace.parent.with_name("first"))  # folders are named by the second
    traced = train(tmp_path / "run", profile_steps=3)
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 2
    np.testing.assert_array_equal(plain["w"], traced["w"])


def test_a_training_that_ends_while_it_is_traced_leaves_the_profiler_free(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", stop_at=WARMUP_STEPS + 1, profile_steps=5)
    train(tmp_path / "b", steps=4, profile_steps=9)
    assert list((tmp_path / "b").rglob("*.trace.json.gz"))
