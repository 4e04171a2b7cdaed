"""The page: what a run found, from its files alone."""

import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from nas import drawing, words
from nas.fidelity import answer as answer_of
from nas.fidelity import limits as limits_of
from nas.files import write_text
from nas.report import figures
from nas.report.folder import Check, Further, Least, Member, Run, read_run
from nas.search.accuracy import is_error

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
    decimals = 1 if run.environment.data.test < 2000 else 2
    return render("template.html", _context(run), decimals=decimals)


def render(template: str, context: dict[str, Any], *, decimals: int = 1) -> str:
    """A template of this folder, filled, with the style sheet and the library that draws its `plots` inside it."""
    from plotly.offline import get_plotlyjs

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "accuracy": lambda share: words.percent(share, decimals),
        "percent": words.percent,
        "ms": words.ms,
        "count": words.count,
        "size": words.size,
        "seconds": words.seconds,
        "shape": words.shape,
    }
    css = Markup((_HERE / "style.css").read_text(encoding="utf-8"))
    return templates.get_template(template).render(plotly=Markup(get_plotlyjs()), css=css, **context)


def _context(run: Run) -> dict[str, Any]:
    """Everything the template names, but for what `render` adds."""
    summary, winner = run.summary, run.winner
    precision = summary.file
    answer = winner.facts
    handmade = next((m.facts for m in run.baselines if m.facts.role == "handmade"), None)
    other = "int8" if precision == "float32" else "float32"
    plots = {"front": figures.front(run)}
    plots |= {f"latency-{p}": figures.agreement(run, p, proof) for p, proof in run.proof.precisions.items()}
    trained = [m for m in run.members if m.training]
    for quantity in ("loss", "top1"):
        if run.training:
            plots[f"supernet-{quantity}"] = figures.supernet(run.training, quantity)
        if trained:
            plots[f"fine-{quantity}"] = figures.fine_tuning(trained, winner, quantity)
    if run.fidelity:
        plots |= {f"order-{against}": figures.fidelity(run.fidelity, against) for against in ("supernet", "macs")}
    if run.population:
        plots |= {
            f"population-{key}": figures.population(run.population, key) for key in run.population.line[-1].values
        }
    limit = run.limit_ms
    return {
        "run": run,
        "summary": summary,
        "environment": run.environment,
        "experiment": run.experiment,
        "answer": answer,
        "limit_ms": limit,
        "check": winner.checks.get(precision, Check(passed=answer.passed)),
        "other": other,
        "other_check": winner.checks.get(other, Check(passed=False)),
        "alternative": winner.files.get(other),
        "within": None if limit is None else answer.told_ms <= limit,
        "tolerated": limit is not None and limit < answer.told_ms <= summary.tolerated_ms,
        "further": [(limit.name, _least(limit)) for limit in summary.least]
        + [(cost.name, _further(cost)) for cost in summary.further],
        "accurate": any(map(is_error, summary.objectives)),
        "interval": words.wilson(answer.accuracy, run.environment.data.test),
        "handmade": handmade,
        "by_chance": handmade is not None and _by_chance(answer.accuracy, handmade.accuracy, run.environment.data.test),
        "strip": _strip(run, winner),
        "rows": [_row(m) for m in run.members],
        "roles": figures.NAMES,
        "colours": figures.COLOURS,
        "sizes": figures.SIZES,
        "trained": trained,
        "fidelity_answer": answer_of(run.fidelity) if run.fidelity else "",
        "fidelity_limits": limits_of(run.fidelity) if run.fidelity else [],
        "drawings": _drawings(run),
        "failures": Counter(t.failure for t in run.trials if t.failure is not None).most_common(),
        "slowest_stage": max(summary.seconds.values(), default=0.0) or 1.0,
        "commands": _commands(run),
        "plots": plots,
    }


def _least(limit: Least) -> str:
    """What was asked of an accuracy, whether a trial reached it, and what the answer has."""
    told = f"at least {words.percent(limit.asked)} was asked for"
    if limit.tolerated < limit.asked:
        told += f", down to {words.percent(limit.tolerated)} tolerated"
    if not limit.reached:
        nearest = "" if limit.nearest is None else f", the nearest has {words.percent(limit.nearest)}"
        told += f"; NO trial of the search reached it{nearest} (validation images, inherited weights)"
    if limit.answer is None:
        return told
    below = ", below it" if limit.answer < limit.tolerated else ""
    return f"{told}; the answer's file has {words.percent(limit.answer)} on the test images{below}"


def _further(cost: Further) -> str:
    """What the answer has of a cost beside latency, what was asked for, and what the space can reach."""
    unit = words.ms if cost.name.startswith("latency_ms") else words.size if "bytes" in cost.name else words.count
    told = f"the answer has {unit(cost.value)}"
    if cost.limit is not None and cost.tolerated is not None:
        told += f", at most {unit(cost.limit)} was asked for"
        if cost.value > cost.limit:
            told += f": over it, within its tolerance of {unit(cost.tolerated)}"
    return f"{told}; networks of the space have from {unit(cost.reachable[0])} to {unit(cost.reachable[1])}"


def _by_chance(a: float, b: float, images: int) -> bool:
    """Whether so few test images cannot tell two accuracies apart (95 %, two-sided)."""
    return abs(a - b) <= 1.96 * math.sqrt((a * (1 - a) + b * (1 - b)) / images)


def _strip(run: Run, winner: Member) -> Markup | None:
    check = winner.checks.get(run.summary.file)
    facts = winner.facts
    if check is None or check.latency_ms is None or facts.comparable_ms is None:
        return None
    level = facts.machine_level or 1.0
    p10, p90 = ((ms or facts.comparable_ms) / level for ms in (check.latency_ms.p10, check.latency_ms.p90))
    low, high = min(p10, facts.comparable_ms), max(p90, facts.comparable_ms)
    return Markup(drawing.strip(run.summary.reachable_ms, run.limit_ms, low, facts.comparable_ms, high))


def _row(member: Member) -> dict[str, Any]:
    """A network's part of the table, with a line for each precision."""
    return {
        "facts": member.facts,
        "files": [
            {
                "precision": precision,
                "outcome": outcome,
                "spread": check.latency_ms if (check := member.checks.get(precision)) else None,
                "error": outcome.predicted_ms / outcome.comparable_ms - 1 if outcome.comparable_ms else None,
                "reason": (check.reason if check else None) or "",
            }
            for precision, outcome in member.files.items()
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
    limit = run.limit_ms
    winners = max([limit or 0.0, *map(drawing.reach, times[: len(run.winners)])])
    everyone = max([winners, *map(drawing.reach, times)])
    pictures = []
    for member, of in zip(run.members, times, strict=True):
        span = winners if member in run.winners else everyone
        picture = drawing.draw(member.architecture.network, of, positions=positions, limit_ms=limit, span_ms=span)
        pictures.append((member, Markup(picture)))
    return pictures


def _inline(table: dict[str, Any]) -> str:
    """An inline table of TOML; what is None is left out."""
    return "{" + ",".join(f"{key}={json.dumps(value)}" for key, value in table.items() if value is not None) + "}"


def _commands(run: Run) -> list[tuple[str, str]]:
    """What to do next, and the command that does it, in the run's folder."""
    name, experiment = run.summary.name, run.experiment

    def again(suffix: str, change: str) -> str:
        return f"nas run config.toml --out ../{name}-{suffix} --set name={name}-{suffix} --set {change}"

    low, high = run.summary.reachable_ms
    share = (run.summary.limit_ms - low) / (high - low) if high > low else 0.0
    lower = {"at_most": f"{50 * share:.3g}%"}
    objectives = [msgspec.to_builtins(o) | (lower if o.name == "latency_ms" else {}) for o in experiment.objectives]
    faster = f"objectives=[{','.join(map(_inline, objectives))}]"
    if "latency_ms" in experiment.limits:
        faster = f"limits.latency_ms={_inline(msgspec.to_builtins(experiment.limit) | lower)}"
    return [
        (
            "Prove the files again, on this machine as it is now:",
            "nas verify config.toml --out . && nas report config.toml --out .",
        ),
        ("Write the answer's files for your program:", f"nas export {run.winner.facts.folder} --out answer.onnx"),
        ("Search longer:", again("longer", f"search.trials={4 * experiment.search.trials}")),
        ("Ask for a faster network:", again("faster", shlex.quote(faster))),
        ("Another seed, to see how much of this was luck:", again("seed", f"seed={experiment.seed + 1}")),
        ("Your own images, a folder for each class:", again("mine", "data.source=/path/to/images")),
        (
            "Another device, on the machine that has it:",
            "nas doctor\nnas list devices\n" + again("there", "device=NAME"),
        ),
    ]
