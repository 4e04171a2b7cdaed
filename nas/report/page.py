"""The page: what a run found, from its files alone."""

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nas.files import write_text
from nas.report import drawing, figures, words
from nas.report.folder import Check, Member, Run, read_run

_HERE = Path(__file__).parent


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder`/report.html, one self-contained page, and returns its path.

    Raises:
        RunError: the run is not finished, one of its files is damaged, or the page cannot be written.
    """
    run = read_run(Path(run_folder))
    path = run.folder / "report.html"
    write_text(path, _render(run))
    return path


def _render(run: Run) -> str:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    decimals = 1 if run.environment.data.test < 2000 else 2
    templates.filters |= {
        "accuracy": lambda share: words.percent(share, decimals),
        "percent": words.percent,
        "ms": words.ms,
        "count": words.count,
        "size": words.size,
        "seconds": words.seconds,
        "shape": words.shape,
    }
    return templates.get_template("template.html").render(_context(run))


def _context(run: Run) -> dict[str, Any]:
    """Everything the template names."""
    from plotly.offline import get_plotlyjs

    summary, winner = run.summary, run.winner
    precision = summary.precision
    answer = winner.facts.outcome(precision) or winner.facts
    other = "int8" if precision == "float32" else "float32"
    plots = {"front": figures.front(run)}
    plots |= {f"latency-{p}": figures.agreement(run, p, proof) for p, proof in run.proof.precisions.items()}
    trained = [m for m in run.members if m.training]
    for quantity in ("loss", "top1"):
        if run.training:
            plots[f"supernet-{quantity}"] = figures.supernet(run.training, quantity)
        if trained:
            plots[f"fine-{quantity}"] = figures.fine_tuning(trained, winner, quantity)
    limit = summary.limit_ms
    return {
        "run": run,
        "summary": summary,
        "environment": run.environment,
        "experiment": run.experiment,
        "winner": winner.facts,
        "answer": answer,
        "check": winner.checks.get(precision, Check(passed=answer.passed)),
        "other": other,
        "other_check": winner.checks.get(other, Check(passed=False)),
        "alternative": winner.facts.outcome(other),
        "within": None if limit is None or answer.latency_ms is None else answer.latency_ms <= limit,
        "interval": None if answer.accuracy is None else words.wilson(answer.accuracy, run.environment.data.test),
        "by_chance": _by_chance(run),
        "strip": _strip(run, winner),
        "rows": [_row(m) for m in run.members],
        "roles": figures.NAMES,
        "colours": figures.COLOURS,
        "sizes": figures.SIZES,
        "trained": trained,
        "drawings": _drawings(run),
        "failures": Counter(t.failure for t in run.trials if t.failure is not None).most_common(),
        "slowest_stage": max(summary.seconds.values(), default=0.0) or 1.0,
        "commands": _commands(run),
        "plots": plots,
        "plotly": Markup(get_plotlyjs()),
        "css": Markup((_HERE / "style.css").read_text(encoding="utf-8")),
    }


def _by_chance(run: Run) -> bool:
    """Whether so few test images cannot tell the answer's accuracy from the hand-made network's (95 %, two-sided)."""
    found = [m.facts for m in (run.winner, *run.baselines) if m is run.winner or m.facts.role == "handmade"]
    shares = [o.accuracy for f in found if (o := f.outcome(run.summary.precision)) and o.accuracy is not None]
    if len(shares) != 2:
        return False
    spread = math.sqrt(sum(share * (1 - share) for share in shares) / run.environment.data.test)
    return abs(shares[0] - shares[1]) <= 1.96 * spread


def _strip(run: Run, winner: Member) -> Markup | None:
    check = winner.checks.get(run.summary.precision)
    if check is None or check.latency_ms is None:
        return None
    spread = check.latency_ms
    return Markup(drawing.strip(run.summary.reachable_ms, run.summary.limit_ms, spread.p10, spread.median, spread.p90))


def _row(member: Member) -> dict[str, Any]:
    """A network's part of the table, with a line for each precision."""
    files = {p: o for p in ("float32", "int8") if (o := member.facts.outcome(p)) is not None}
    return {
        "facts": member.facts,
        "files": [
            {
                "precision": precision,
                "outcome": outcome,
                "spread": check.latency_ms if (check := member.checks.get(precision)) else None,
                "error": outcome.predicted_ms / outcome.latency_ms - 1
                if outcome.predicted_ms and outcome.latency_ms
                else None,
                "reason": (check.reason if check else None) or "",
            }
            for precision, outcome in files.items()
        ],
    }


def _drawings(run: Run) -> list[tuple[Member, Markup]]:
    """Every winner and baseline with its picture; winners to one scale, baselines to another."""
    summary = run.summary
    times = []
    for member in run.members:
        blocks = member.blocks.get(summary.precision) or next(iter(member.blocks.values()), ())
        times.append([b.latency_ms for b in blocks])
    positions = [p.name for p in run.space.positions] if run.space else ()
    limit = summary.limit_ms
    winners = max([limit or 0.0, *map(sum, times[: len(run.winners)])])
    everyone = max([winners, *map(sum, times)])
    pictures = []
    for member, of in zip(run.members, times, strict=True):
        span = winners if member in run.winners else everyone
        picture = drawing.draw(member.architecture.network, of, positions=positions, limit_ms=limit, span_ms=span)
        pictures.append((member, Markup(picture)))
    return pictures


def _commands(run: Run) -> list[tuple[str, str]]:
    """What to do next, and the command that does it, in the run's folder."""
    name, trials = run.summary.name, 4 * run.experiment.search.trials
    again = "nas run config.toml --set name="
    return [
        ("Check the files once more, here or on another machine:", "nas verify ."),
        ("Export the answer:", f"nas export {shlex.quote(run.winner.facts.folder)}"),
        ("Search longer:", f"{again}{name}-longer --set search.trials={trials}"),
        ("Ask for a faster network:", f"{again}{name}-faster --set "
         """'objectives=[{name="top1"},{name="latency_ms",at_most="25%"}]'"""),
        ("Another seed, to see how much of this was luck:", f"{again}{name}-seed --set seed={run.experiment.seed + 1}"),
        ("Your own images, a folder for each class:", f"{again}{name}-mine --set data.source=/path/to/images"),
        ("Another device: see what this machine can do, then run there:", "nas doctor\nnas list\nnas run config.toml"),
    ]  # fmt: skip
