"""What a front answers, draws and explains: only what was counted, and what the trials bear out."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import nas
from nas.errors import LimitError, RunError
from nas.search import Front, Setting, Trial
from nas.search.explain import one_hot

SPACE = nas.Space.of_choices({"width": [8, 16, 24], "kernel": [3, 5, 7], "idle": ["a", "b"], "one": [1]})


def trial(number, genotype, here, there, error):
    cheap = {"latency_ms": here, "latency_ms@there": there}
    return Trial(number, genotype, round(10_000 * (1 - error)), 10_000, cheap)


def every_trial():
    """The error falls with width, and a little with kernel; only width takes time here, only kernel there."""
    whole = np.stack(np.unravel_index(np.arange(18), SPACE.sizes), axis=1)
    return [
        trial(i, tuple(map(int, g)), 1.0 + g[0], 5.0 + 2 * g[1], 0.5 - 0.1 * g[0] - 0.02 * g[1])
        for i, g in enumerate([*whole, *whole])
    ]


@pytest.fixture
def front():
    return Front.of(every_trial(), setting=Setting(SPACE, "here", {}, {"latency_ms": 2.5}))


def test_a_front_answers_only_for_the_costs_that_were_counted(front):
    here = front.counting("error", "latency_ms")
    assert len(here) == 3
    assert len(front) == 9
    with pytest.raises(LimitError, match=r"latency_ms@there was not counted.*front\.counting\('error', 'latency_ms'"):
        here.best(**{"latency_ms@there": 6.0})
    with pytest.raises(LimitError, match="its devices: here"):
        here.best(latency_ms=6.0, device="there")
    # 5 ms there have a trial, of which the front of `here` knows nothing
    assert here.counting("error", "latency_ms@there").best(latency_ms=5, device="there").genotype[:2] == (2, 0)


def test_the_knee_does_not_depend_on_costs_that_were_not_counted():
    trials = [
        Trial(0, (0, 0), 50, 100, {"latency_ms": 1.0, "macs": 9e9}),
        Trial(1, (0, 1), 80, 100, {"latency_ms": 2.0, "macs": 9e9}),
        Trial(2, (1, 1), 90, 100, {"latency_ms": 6.0, "macs": 1.0}),
    ]
    assert Front.of(trials, ("error", "latency_ms")).knee().trial == 1
    assert Front.of(trials).counting("error", "latency_ms").knee().trial == 1


def test_the_device_says_whose_latency_is_limited(front):
    assert front.best(latency_ms=2.5, device="here") == front.best(latency_ms=2.5)
    assert front.best(latency_ms=5.0, device="there") == front.best(**{"latency_ms@there": 5.0})
    with pytest.raises(LimitError, match="its devices: here, there"):
        front.best(latency_ms=5.0, device="elsewhere")
    with pytest.raises(LimitError, match="give `latency_ms` too"):
        front.best(device="here")


def test_a_front_without_success_tells_the_last_failure():
    failed = Front.of([Trial(0, (0,), None, 10, {"latency_ms": 1.0}, "out of memory")])
    with pytest.raises(LimitError, match="out of memory"):
        failed.best()


def test_the_text_form_of_a_long_front_is_short():
    trials = [Trial(i, (i,), 100 + i, 1000, {"latency_ms": 1.0 + i}) for i in range(100)]
    text = repr(Front.of(trials))
    assert len(text.splitlines()) == 23
    assert "80 more" in text
    assert text.startswith("Front(100 trials of 100: error, latency_ms)")


def test_the_picture_has_a_panel_a_cost_every_trial_of_the_front_and_the_limit(front, tmp_path):
    drawing = front.plot(against={"first <half>": Front.of(every_trial()[:5])})
    root = ElementTree.fromstring(drawing.svg)
    told = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    pairs = [front.counting("error", name) for name in ("latency_ms", "latency_ms@there")]
    assert len(told) == sum(map(len, pairs))
    assert "at most 2.5" in drawing.svg
    assert "first &lt;half&gt;" in drawing.svg
    for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', drawing.svg):
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 322
    assert drawing.save(tmp_path / "front.svg").read_text().startswith("<svg")
    assert drawing._repr_svg_() == drawing.svg
    assert front.plot().svg in front._repr_html_()
    with pytest.raises(RunError, match=r"ends in \.svg"):
        drawing.save(tmp_path / "front.png")


def test_a_single_trial_can_be_drawn_and_none_is_refused():
    one = Front.of(every_trial()[:1])
    ElementTree.fromstring(one.plot().svg)
    with pytest.raises(LimitError, match="Nothing to draw"):
        Front.of([]).plot()


def test_importances_find_the_choices_that_matter_and_only_those(front):
    told = front.explain(front.best())
    by_cost = {cost: {e.choice: e for e in effects} for cost, effects in told.effects.items()}
    assert [e.choice for e in told.effects["error"]][:2] == ["width", "kernel"]
    assert next(e.choice for e in told.effects["latency_ms"]) == "width"
    assert next(e.choice for e in told.effects["latency_ms@there"]) == "kernel"
    for cost, effects in by_cost.items():
        assert abs(effects["idle"].importance) < 0.01, cost
        assert told.explained[cost] > 0.95
    assert "one" not in by_cost["error"]  # nothing to choose
    np.testing.assert_allclose(by_cost["latency_ms"]["width"].importance, 1.0, atol=0.12)  # nearly all of the variance
    np.testing.assert_allclose(by_cost["error"]["width"].contribution, -0.1, atol=0.01)  # widest, against the mean


def test_noise_is_said_to_be_unexplained():
    rng = np.random.default_rng(0)
    noise = [
        Trial(t.trial, t.genotype, int(rng.integers(5000, 9000)), 10_000, {"latency_ms": t.latency_ms})
        for t in every_trial()
    ]
    told = Front.of(noise, setting=Setting(SPACE)).explain(noise[0])
    assert told.explained["error"] < 0.3 < told.explained["latency_ms"]
    assert "read with care" in repr(told)


def test_an_explanation_is_a_table_and_pictures(front, tmp_path):
    told = front.explain(front.best())
    rows = told.rows()
    assert {row["choice"] for row in rows} == {"width", "kernel", "idle"}
    assert rows[0]["value"] == 24
    ElementTree.fromstring(told.plot().svg)
    assert (told.save(tmp_path / "why") / "importance.svg").exists()
    frame = pytest.importorskip("pandas") and told.to_frame()
    assert "importance of latency_ms@there" in frame.columns


def test_what_was_searched_must_be_known_and_enough_trials(front):
    with pytest.raises(RunError, match="not known what was searched"):
        Front.of(every_trial()).explain(front.best())
    with pytest.raises(RunError, match="at least 20"):
        Front.of(every_trial()[:19], setting=Setting(SPACE)).explain(front.best())


def test_a_choice_without_effect_has_no_column_set():
    space = nas.load_space("nas_bench_macro")
    conditional = nas.load_space("mobilenet_v3_32")
    for each in (space, conditional):
        genotypes = each.sample(np.random.default_rng(0), 50)
        design, owner = one_hot(each, genotypes)
        for row, genotype in zip(design, genotypes, strict=True):
            described = each.describe(genotype)
            for gene, choice in enumerate(each.choices):
                assert row[owner == gene].sum() == (choice.name in described)
