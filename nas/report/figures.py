"""The plots, as Plotly's JSON. Colours are mid-tones that read on white and on black; text is coloured by the page."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from nas import words
from nas.fidelity import Fidelity
from nas.latency import Proof, Tried
from nas.report.folder import Agreement, Member, Metrics, Population, Run, Trained
from nas.search import Front, Trial
from nas.search.accuracy import Least

Figure = dict[str, Any]

COLOURS = {
    "trial": "#8f99a8",
    "front": "#4a8fe0",
    "winner": "#ee7733",
    "handmade": "#a077d6",
    "smallest": "#2f9e8f",
    "largest": "#2f9e8f",
    "limit": "#d9534f",
}
SYMBOLS = {"winner": "diamond", "handmade": "square", "smallest": "triangle-down", "largest": "triangle-up"}
NAMES = {"winner": "winner", "handmade": "hand-made", "smallest": "smallest", "largest": "largest"}
SIZES = {  # of the networks that the supernet is trained on in every step
    "largest": ("largest network", "#4a8fe0"),
    "random": ("random networks", "#8f99a8"),
    "smallest": ("smallest network", "#2f9e8f"),
}
_POINTS = 150  # of a training curve: more are averaged


def front(run: Run) -> Figure:
    """Accuracy against latency: what was tried, the front, and what came of it."""
    precision, limit_ms = run.summary.file, run.limit_ms
    whole = run.whole
    asked = {n.name: Least(n.asked, n.tolerated) for n in run.summary.least}
    reached = [t for t in whole if not t.missing(asked)]
    undominated = list(Front.of(reached, ("error", "latency_ms")))
    on_front = {t.trial for t in undominated}
    dominated = [t for t in whole if t.failure is None and t.trial not in on_front]
    fewer = [t for t in run.trials if t.failure is None and t.total < whole[0].total]
    grey = {"color": COLOURS["trial"], "size": 6, "opacity": 0.5}
    faint = {**grey, "symbol": "circle-open"}
    blue = {"color": COLOURS["front"], "size": 8}
    steps = {"color": COLOURS["front"], "width": 1.5, "shape": "hv"}
    traces = [
        _tried(dominated, run, name="trials", marker=grey),
        _tried(fewer, run, name="trials on fewer images", marker=faint, visible="legendonly"),
        _tried(undominated, run, name="front of the trials", mode="lines+markers", line=steps, marker=blue),
        _risen(run),
    ]
    for role, name in NAMES.items():
        of_role = [m for m in run.members if m.facts.role == role]
        traces.append(_became(of_role, precision, name=f"{name}, {precision}", marker=_marker(role)))
    other = "int8" if precision == "float32" else "float32"
    hollow = {**_marker("winner"), "symbol": "diamond-open"}
    traces.append(_became(run.winners, other, name=f"winner, {other}", marker=hollow))

    figure = _figure(traces, "latency, ms (logarithmic)", "top-1 accuracy", percent=True)
    layout = figure["layout"]
    layout |= {"height": 520, "showlegend": True}
    layout["margin"]["t"] = 64
    limits = [] if limit_ms is None else [limit_ms]
    layout["xaxis"] |= _logarithmic([*limits, *(x for trace in traces for x in trace["x"] if x is not None)])
    red = {"color": COLOURS["limit"], "width": 1.5, "dash": "dash"}
    layout["shapes"] = [
        {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "layer": "below", "line": red}
        for x in limits
    ]
    drawn = [n for n in run.summary.least if n.name == run.experiment.accuracy]  # what the axis has
    layout["shapes"] += [
        {"type": "line", "y0": n.asked, "y1": n.asked, "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": red}
        for n in drawn
    ]
    beside = {"showarrow": False, "xanchor": "left", "yanchor": "bottom", "xshift": 4}
    layout["annotations"] = [
        {"x": math.log10(x), "yref": "paper", "y": 0, "text": f"limit {words.ms(x)}", **beside} for x in limits
    ]
    layout["annotations"] += [
        {"xref": "paper", "x": 0, "y": n.asked, "text": f"{n.name} at least {words.percent(n.asked)}", **beside}
        for n in drawn
    ]
    return figure


def agreement(run: Run, precision: str, proof: Agreement) -> Figure:
    """Measured against predicted latency, in one precision."""
    held_out = [("held-out network", r.predicted_ms, r.measured_ms) for r in proof.rows]
    blue = {"color": COLOURS["front"], "size": 7, "opacity": 0.75}
    groups = [(held_out, blue)]
    for role in NAMES:
        files = [(m.facts.name, m.files.get(precision)) for m in run.members if m.facts.role == role]
        known = [(n, o.predicted_ms, o.comparable_ms) for n, o in files if o and o.comparable_ms is not None]
        groups.append((known, _marker(role)))
    return _against(groups)


def proved(proof: Proof) -> Figure:
    """Measured against predicted latency of the networks of a table's proof."""
    rows = [(numbered(i), r.predicted_ms, r.measured_ms) for i, r in enumerate(proof.rows, 1)]
    return _against([(rows, {"color": COLOURS["front"], "size": 7, "opacity": 0.75})])


def errors(proof: Proof, xs: Sequence[float], title: str, *, macs: bool = False) -> Figure:
    """Relative error of each network of a proof against `xs`: latency in ms, or MACs."""
    ys = [r.predicted_ms / r.measured_ms - 1 for r in proof.rows]
    texts = [
        f"<b>{numbered(i)}</b><br>{words.percent(y, sign=True)}: predicted {words.ms(r.predicted_ms)}, measured "
        f"{words.ms(r.measured_ms)}<br>{words.count(x) + ' MACs' if macs else ''}"
        for i, (r, x, y) in enumerate(zip(proof.rows, xs, ys, strict=True), 1)
    ]
    figure = _figure(
        [_dots(xs, ys, texts, marker={"color": COLOURS["front"], "size": 7, "opacity": 0.75})], title, "error"
    )
    axis, layout = _logarithmic(xs), figure["layout"]
    layout["xaxis"] |= axis | ({"ticktext": [words.count(tick) for tick in axis["tickvals"]]} if macs else {})
    reach = 1.1 * max(0.06, *map(abs, ys))
    layout["yaxis"] |= {
        "tickformat": "+.1~%",
        "range": [-reach, reach],
        "zeroline": True,
        "zerolinecolor": COLOURS["trial"],
    }
    layout["shapes"] = [
        {
            "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": -share, "y1": share, "layer": "below",
            "line": {"width": 0}, "fillcolor": f"rgba(143, 153, 168, {opacity})",
        }
        for share, opacity in ((0.10, 0.10), (0.05, 0.16))
    ]  # fmt: skip
    return figure


def forms(tried: Sequence[Tried], chosen: str) -> Figure:
    """Error of each form of correction on anchors that it was not fitted on, with one standard error."""
    colours = [COLOURS["winner" if t.form == chosen else "trial"] for t in tried]
    bars = {
        "type": "data",
        "array": [t.error_high - t.error for t in tried],
        "arrayminus": [t.error - t.error_low for t in tried],
        "thickness": 1,
        "width": 4,
        "color": COLOURS["trial"],
    }
    texts = [
        f"<b>{t.form}</b><br>{words.percent(t.error)}, {words.percent(t.error_low)} to {words.percent(t.error_high)}"
        for t in tried
    ]
    names = [t.form for t in tried]
    dots = _dots([t.error for t in tried], names, texts, marker={"color": colours, "size": 10}, error_x=bars)
    figure = _figure([dots], "error on anchors left out (root mean square)", "")
    figure["layout"]["xaxis"] |= {"tickformat": ".1~%", "rangemode": "tozero"}
    figure["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category"}
    figure["layout"]["height"] = 60 + 34 * len(tried)
    return figure


def fidelity(found: Fidelity, against: str) -> Figure:
    """Top-1 of training alone, with its 95 % interval, against the supernet's ("supernet"), or "macs"."""
    of_supernet = against == "supernet"
    xs = [n.supernet / found.images if of_supernet else n.macs for n in found.networks]
    alone = [n.alone_mean / found.images for n in found.networks]
    ends = [words.wilson(share, found.images) for share in alone]
    texts = [
        f"<b>network {number}</b><br>{words.percent(share)} alone, {words.percent(n.supernet / found.images)} with the "
        f"supernet's weights<br>{words.count(n.macs)} MACs, {words.count(n.parameters)} parameters"
        for number, (n, share) in enumerate(zip(found.networks, alone, strict=True), start=1)
    ]
    bars = {
        "type": "data",
        "array": [high - share for share, (_, high) in zip(alone, ends, strict=True)],
        "arrayminus": [share - low for share, (low, _) in zip(alone, ends, strict=True)],
        "thickness": 1,
        "width": 0,
        "color": COLOURS["trial"],
    }
    dots = _dots(xs, alone, texts, marker={"color": COLOURS["front"], "size": 8}, error_y=bars)
    title = "top-1 with the supernet's weights" if of_supernet else "MACs (logarithmic)"
    figure = _figure([dots], title, "top-1, trained alone", percent=True)
    if of_supernet:
        figure["layout"]["xaxis"]["tickformat"] = ".1~%"
    else:
        axis = _logarithmic(xs)
        figure["layout"]["xaxis"] |= axis | {"ticktext": [words.count(tick) for tick in axis["tickvals"]]}
    return figure


def supernet(metrics: Metrics, quantity: str) -> Figure:
    """`quantity` ("loss" or "top1") of the supernet's largest, random and smallest networks against steps."""
    curves = [_curve(metrics, f"{quantity}_{size}", name, colour) for size, (name, colour) in SIZES.items()]
    return _curves(curves, quantity)


def population(found: Population, key: str) -> Figure:
    """The values of a hyper-parameter in each interval: of all members, and of the line that led to the winner."""
    line = {(m.generation, m.member) for m in found.line}
    of = {(m.generation, m.member): m for m in found.members}
    xs: list[float | None] = []
    ys: list[float | None] = []
    for m in found.members:  # from each parent to what it was gone on with as; a gap between two
        parent = of.get((m.source, m.parent))
        if parent is not None:
            xs += [parent.interval + 1, m.interval + 1, None]
            ys += [parent.values[key], m.values[key], None]
    grey = {"color": COLOURS["trial"], "width": 1}
    lines = {"x": xs, "y": ys, "name": "gone on with", "mode": "lines", "line": grey, "hoverinfo": "skip"}

    def dots(members: Sequence[Trained], **style: Any) -> Figure:
        texts = [_of_member(found, m) for m in members]
        return _dots([m.interval + 1 for m in members], [m.values[key] for m in members], texts, **style)

    others = [m for m in found.members if (m.generation, m.member) not in line]
    orange = {"color": COLOURS["winner"], "width": 2.5}
    traces = [
        lines,
        dots(others, name="members", marker={"color": COLOURS["trial"], "size": 6}),
        dots(found.line, name="the winner's line", mode="lines+markers", line=orange, marker=_marker("winner")),
    ]
    figure = _figure(traces, "interval", key)
    values = [m.values[key] for m in found.members]
    if min(values) > 0:
        figure["layout"]["yaxis"] |= _logarithmic(values)
        figure["layout"]["yaxis"]["title"]["text"] += " (logarithmic)"
    figure["layout"]["xaxis"] |= {"tickformat": "d"}
    return figure


def _of_member(found: Population, m: Trained) -> str:
    top1 = found.top1(m)
    did = "diverged" if top1 is None else f"top-1 {words.percent(top1)}"
    values = "<br>".join(f"{escape(key)} {value:.4g}" for key, value in m.values.items())
    return f"<b>member {m.member + 1}, interval {m.interval + 1}</b>: {did}<br>{values}"


def fine_tuning(members: Sequence[Member], winner: Member, quantity: str) -> Figure:
    """`quantity` ("loss" or "top1") of winners and baselines against steps."""
    curves = []
    for member in members:
        curve = _curve(member.training, quantity, member.facts.name, COLOURS[member.facts.role])
        curve["line"]["width"] = 2.5 if member is winner else 1.2
        curve["line"]["dash"] = {"smallest": "dot", "largest": "dash"}.get(member.facts.role, "solid")
        curves.append(curve)
    return _curves(curves, quantity)


def _tried(trials: Sequence[Trial], run: Run, **style: Any) -> Figure:
    """Trials: validation accuracy and predicted latency."""
    texts, in_int8 = [], " in int8" * (run.experiment.counted == "int8")
    for t in trials:
        networks = words.network(run.space.decode(t.genotype)) if run.space else ["-".join(map(str, t.genotype))]
        head = (
            f"<b>trial {t.trial}</b>: {words.percent(t.top1)} of {t.total} validation images{in_int8}, "
            f"{words.ms(t.latency_ms)} predicted"
        )
        texts.append("<br>".join([head, *map(escape, networks)]))
    return _dots([t.latency_ms for t in trials], [t.top1 for t in trials], texts, **style)


def _became(members: Iterable[Member], precision: str, **style: Any) -> Figure:
    """Networks after fine-tuning: test accuracy and latency of their files in `precision`, measured if it could be."""
    files = [(m, m.files.get(precision)) for m in members]
    known = [(m, o.told_ms, o.accuracy, o.how) for m, o in files if o]
    texts = []
    for member, latency_ms, accuracy, how in known:
        facts = f"{words.percent(accuracy)} of the test images, {words.ms(latency_ms)} {how}, {precision}"
        lines = [facts, *words.network(member.architecture.network)]
        texts.append("<br>".join([f"<b>{escape(member.facts.name)}</b>", *map(escape, lines)]))
    return _dots([row[1] for row in known], [row[2] for row in known], texts, **style)


def _risen(run: Run) -> Figure:
    """From each winner's trial to what became of it."""
    trial_of = {t.genotype: t for t in run.whole if t.failure is None}
    xs: list[float | None] = []
    ys: list[float | None] = []
    for member in run.winners:
        trial, outcome = trial_of.get(member.architecture.genotype), member.files.get(run.summary.file)
        if trial is not None and outcome is not None:
            xs += [trial.latency_ms, outcome.told_ms, None]
            ys += [trial.top1, outcome.accuracy, None]
    dotted = {"color": COLOURS["winner"], "width": 1, "dash": "dot"}
    return {"x": xs, "y": ys, "name": "from trial to winner", "mode": "lines", "line": dotted, "hoverinfo": "skip"}


def _against(groups: Sequence[tuple[Sequence[tuple[str, float, float]], Figure]]) -> Figure:
    """(name, predicted, measured) of networks, in groups with a marker each; within 5 and 10 % is shaded."""
    axis = _logarithmic([ms for rows, _ in groups for row in rows for ms in row[1:]])
    low, high = (10**end for end in axis["range"])
    equal = {"mode": "lines", "line": {"color": COLOURS["trial"], "width": 1}, "hoverinfo": "skip"}
    traces = [
        _band(0.10, low, high, opacity=0.10),
        _band(0.05, low, high, opacity=0.16),
        {"x": [low, high], "y": [low, high], **equal},
    ]
    for rows, marker in groups:
        texts = [
            f"<b>{escape(name)}</b><br>predicted {words.ms(predicted)}, measured {words.ms(measured)} "
            f"({words.percent(predicted / measured - 1, sign=True)})"
            for name, predicted, measured in rows
        ]
        traces.append(_dots([row[1] for row in rows], [row[2] for row in rows], texts, marker=marker))
    figure = _figure(traces, "predicted, ms", "measured, ms")
    for name in ("xaxis", "yaxis"):
        figure["layout"][name] |= axis
    return figure


def numbered(number: int) -> str:
    """How a network of a proof is called on the page."""
    return f"network {number}"


def _dots(x: Sequence[float], y: Sequence[float] | Sequence[str], texts: Sequence[str], **style: Any) -> Figure:
    """Points with a text each, shown when pointed at."""
    return {"x": x, "y": y, "text": texts, "hovertemplate": "%{text}<extra></extra>", "mode": "markers", **style}


def _marker(role: str) -> Figure:
    return {"color": COLOURS[role], "symbol": SYMBOLS[role], "size": 12 if role == "winner" else 10}


def _band(share: float, low: float, high: float, *, opacity: float) -> Figure:
    """Where the measured latency is within `share` of the predicted one."""
    return {
        "x": [low, high, high, low],
        "y": [low * (1 - share), high * (1 - share), high * (1 + share), low * (1 + share)],
        "mode": "none",
        "fill": "toself",
        "fillcolor": f"rgba(143, 153, 168, {opacity})",
        "hoverinfo": "skip",
    }


def _curve(metrics: Metrics, key: str, name: str, colour: str) -> Figure:
    """One line; long ones are averaged over equal numbers of rows."""
    known = [(r.get("step"), r.get(key)) for r in metrics]
    rows = [(x, y) for x, y in known if x is not None and y is not None and math.isfinite(y)]
    each = -(-len(rows) // _POINTS) or 1
    groups = [rows[i : i + each] for i in range(0, len(rows), each)]
    return {
        "x": [group[-1][0] for group in groups],
        "y": [round(math.fsum(value for _, value in group) / len(group), 5) for group in groups],
        "name": escape(name),
        "mode": "lines",
        "line": {"color": colour, "width": 1.5},
    }


def _curves(curves: list[Figure], quantity: str) -> Figure:
    """Curves against steps; top-1 as a share, and losses from zero."""
    is_share = quantity == "top1"
    figure = _figure(curves, "step", "top-1 in training" if is_share else "loss", percent=is_share)
    figure["layout"]["hovermode"] = "x unified"
    figure["layout"]["yaxis"] |= {"hoverformat": ".1%"} if is_share else {"hoverformat": ".3f", "rangemode": "tozero"}
    return figure


def _figure(traces: list[Figure], x: str, y: str, *, percent: bool = False) -> Figure:
    """The traces that have points, and a calm layout."""
    axis = {"zeroline": False, "automargin": True, "gridcolor": "#dfe3e7"}
    return {
        "data": [{"type": "scatter", "showlegend": True, **trace} for trace in traces if trace["x"]],
        "layout": {
            "height": 360,
            "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "font": {"family": "system-ui, sans-serif", "size": 12.5},
            "showlegend": False,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left", "namelength": -1},
            "hovermode": "closest",
            "xaxis": {**axis, "title": {"text": x}},
            "yaxis": {**axis, "title": {"text": y}, **({"tickformat": ".1~%"} if percent else {})},
        },
    }


def _logarithmic(values: Sequence[float]) -> Figure:
    """An axis that holds `values` with some room, ticks at round numbers."""
    low, high = (math.log10(0.94 * min(values)), math.log10(1.06 * max(values))) if values else (-1.0, 0.0)
    steps = (1, 1.5, 2, 3, 5, 7) if high - low < 1.3 else (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [float(f"{m}e{k}") for k in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    ticks = [t for t in ticks if low <= math.log10(t) <= high]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}
