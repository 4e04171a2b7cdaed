"""Stage 7: summary.json and report.html."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nas import cost
from nas.config import ACCURACIES
from nas.files import damaged, write_json
from nas.pipeline.costs import Cost, exact_costs, least_of, minimised
from nas.pipeline.export import file_name
from nas.pipeline.finish import Finished, finished
from nas.pipeline.job import Job
from nas.pipeline.verify import verdicts_of
from nas.report import write_report
from nas.search import Front, Setting, Trials, read_trials
from nas.search.accuracy import Least, is_error

_ROUNDING = 1e-9  # of shares, as in `Least`


def report(job: Job) -> None:
    """Writes summary.json and report.html, and says the answer."""
    job.folder.require("verify")
    result = summary(job)
    write_json(job.path / "summary.json", result)
    page = write_report(job.path)
    winner = result["winner"]
    job.console.say()
    job.console.say(result["verdict"])
    job.console.say(f"Network: {job.path / winner['folder']}    Report: {page}")


def summary(job: Job) -> dict[str, Any]:
    """What summary.json has."""
    made = [_entry(job, f) for f in finished(job.path)]
    winners = [e for e in made if e["role"] == "winner"]
    baselines = [e for e in made if e["role"] != "winner"]
    sound = [e for e in winners if e["passed"]] or winners  # none: the verdict begins with it
    # Chosen by validation accuracy and predicted latency, neither of which is a test result or a noisy timing.
    if job.experiment.maximised:
        winner = min(sound, key=lambda e: (-e["validation_accuracy"], e["predicted_ms"]))
    else:  # the first is the cheapest that reached the limit; fine-tuning may have cost it that
        needed = least_of(job.experiment.least).get("top1", Least(0.0, 0.0)).tolerated
        winner = min(
            sound,
            key=lambda e: (
                max(0.0, needed - _ROUNDING - e["validation_accuracy"]),
                e["name"] != "winner_1",
                e["predicted_ms"],
            ),
        )
    trials = read_trials(job.path / "search" / "journal.jsonl")
    least = _least(job, trials, winner)
    hand = next(e for e in baselines if e["role"] == "handmade")
    refused = [
        {"name": e["name"], "precision": precision, "reason": verdict.reason}
        for e in made
        for precision, verdict in verdicts_of(job.path / e["folder"]).items()
        if not verdict.passed
    ]
    return {
        "name": job.experiment.name,
        "question": job.experiment.question,
        "precision": job.precision,
        "file_precision": job.file,
        "limit_ms": job.limit.ms,
        "tolerated_ms": job.limit.tolerated_ms,
        "limit": job.limit.asked,
        "reachable_ms": [job.limit.fastest_ms, job.limit.slowest_ms],
        "reachable_caveat": job.limit.caveat,
        "further": [_further(made, winner["genotype"]) for made in exact_costs(job)[1:]],
        "objectives": list(minimised(job.experiment)),
        "least": least,
        "winner": winner,
        "winners": winners,
        "baselines": baselines,
        "beats_handmade": winner["accuracy"] > hand["accuracy"],
        "verdict": verdict_of(
            winner,
            hand,
            limit_ms=job.limit.ms,
            tolerated_ms=job.limit.tolerated_ms,
            test_images=len(job.data.test.labels),
            trials=job.experiment.search.trials,
            precisions=(job.precision, job.file),
            least=least,
            objectives=minimised(job.experiment),
        ),
        "refused": refused,
        "trials": len(trials),
        "seconds": job.folder.seconds(),
    }


def verdict_of(
    winner: dict[str, Any],
    hand: dict[str, Any],
    *,
    limit_ms: float,
    tolerated_ms: float = 0.0,
    test_images: int,
    trials: int,
    precisions: tuple[str, str] = ("", ""),
    least: Sequence[Mapping[str, Any]] = (),
    objectives: Sequence[str] = ("error", "latency_ms"),
) -> str:
    """The answer in words, whatever it is.

    Args:
        winner, hand: entries of summary.json: the answer, and the hand-made network. Where their `comparable_ms` is
            None nothing was measured, and predictions are told as such.
        limit_ms: that was asked for.
        tolerated_ms: what its tolerance lets pass, if it has one.
        test_images: how many each accuracy was counted over.
        trials: of the search.
        precisions: of the latencies, and of the file, which differ where no runtime at hand has the former.
        least: limits on accuracy, as summary.json has them.
        objectives: what was minimised.
    """
    points = 100 * (winner["accuracy"] - hand["accuracy"])
    refused = "" if winner["passed"] else "NO network passed verification; do not deploy this one. "
    measured = winner["comparable_ms"] is not None
    ms, hand_ms = (e["comparable_ms"] if measured else e["predicted_ms"] for e in (winner, hand))
    how = f"measured ({winner['predicted_ms']:.4g} predicted)" if measured else "predicted"
    if not measured and winner.get("predicted_low_ms") is not None:
        how += f" (80 % interval {winner['predicted_low_ms']:.4g} to {winner['predicted_high_ms']:.4g})"
    accurate = any(map(is_error, objectives))
    what = "Best" if accurate else "Fastest" if tuple(objectives) == ("latency_ms",) else "Cheapest"
    needed = "".join(f", {limit['name']} at least {limit['asked']:.4g}" for limit in least)
    lead = (
        f"{refused}{''.join(map(missed, least))}{what} network within {limit_ms:.4g} ms{needed}: "
        f"top-1 {winner['accuracy']:.2%} on {test_images} test images, "
        f"{ms:.4g} ms {how}, {winner['size_bytes']:,} bytes."
    )
    over = ms / limit_ms - 1
    late = f" That is {over:.1%} over the limit{', within its tolerance' * (ms <= tolerated_ms)}." if over > 0 else ""
    if not measured:
        late += " The device is not at hand: its latency was NOT measured, and all milliseconds are predictions."
    if precisions[0] != precisions[1]:
        late += f" They are of {precisions[0]}; no runtime at hand has that, and the file is {precisions[1]}."
    level = winner["machine_level"] - 1 if measured else 0.0
    if abs(level) > 0.05:
        late += (
            f" The machine is {abs(level):.0%} {'slower' if level > 0 else 'faster'} now than when its table was "
            f"measured, which is left out of this; now the median is {winner['latency_ms']:.4g} ms."
        )
    late += "".join(map(below, least))
    if winner["genotype"] == hand["genotype"]:
        return (
            f"{lead}{late} It IS the hand-made network: among {trials} trials the search found "
            f"none that does better on the validation images. More trials (search.trials) may."
        )
    compared = (
        f"{'beats' if points > 0 else 'equals' if points == 0 else 'does NOT beat'} the hand-made network "
        f"({hand['accuracy']:.2%} at {hand_ms:.4g} ms)"
    )
    images = round(abs(points) / 100 * test_images)
    by = f" by {abs(points):.2f} points ({images} images)" if points > 0 else ""
    short = f": it is {abs(points):.2f} points ({images} images) below" if points < 0 else ""
    if not accurate:
        by = short = ""
        more = f"{images} images {'more' if points > 0 else 'fewer'}"
        compared = f"classifies {more if points else 'as many images'} correctly as the hand-made network does"
        compared += f" ({hand['accuracy']:.2%} at {hand_ms:.4g} ms)"
    faster = 1 - ms / hand_ms
    speed = f", and is {abs(faster):.0%} {'faster' if faster > 0 else 'slower'}" if abs(faster) >= 0.005 else ""
    return f"{lead}{late} It {compared}{by}{short}{speed}."


def missed(limit: Mapping[str, Any]) -> str:
    """That no trial reached a limit on accuracy, and how near the best came; nothing if one did."""
    if limit["reached"]:
        return ""
    beside = " beside the other limits" * limit["among"]
    return (
        f"NO trial of the search reached {limit['name']} at least {limit['asked']:.4g}{beside}: the nearest had "
        f"{limit['nearest']:.4g} (validation, inherited weights). "
    )


def below(limit: Mapping[str, Any]) -> str:
    """That the answer's file misses a limit on accuracy on the test images; nothing where it does not, or there is no
    such file."""
    if limit["answer"] is None or limit["answer"] >= limit["asked"] - _ROUNDING:
        return ""
    tolerated = ", within its tolerance" * (limit["answer"] >= limit["tolerated"] - _ROUNDING)
    return (
        f" Its {limit['name']} on the test images, {limit['answer']:.4g}, is below the {limit['asked']:.4g} that was "
        f"asked for{tolerated}."
    )


def _least(job: Job, trials: Trials, winner: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is told of each limit on accuracy: what the trials reached, and the answer's file of that precision.

    Limits are reached together: by the trial that misses all of them by the least.
    """
    out, limits = [], least_of(job.experiment.least)
    front = Front.of(trials, setting=Setting(job.space, least=limits))
    nearest = front.nearest
    for name, limit in limits.items():
        precision = ACCURACIES[name]
        file = winner if job.file in (precision, "mixed") else winner.get(precision)
        count, total = (0, 1) if nearest is None else (nearest.count(name) or 0, nearest.total)
        out.append(
            {
                "name": name,
                "asked": limit.asked,
                "tolerated": limit.tolerated,
                "reached": nearest is not None and limit.missing(count, total) == 0,
                "among": len(limits) > 1,
                "nearest": None if nearest is None else count / total,
                "answer": None if file is None else file["accuracy"],
            }
        )
    return out


def _further(made: Cost, genotype: list[int]) -> dict[str, Any]:
    """What the answer has of a cost beside latency; None where it has no limit."""
    limited = math.isfinite(made.limit)
    return {
        "name": made.name,
        "value": float(made.bound(np.array([genotype], np.uint8))[0]),
        "limit": made.limit if limited else None,
        "tolerated": made.tolerated if limited else None,
        "reachable": [made.least, made.most],
    }


def _entry(job: Job, made: Finished) -> dict[str, Any]:
    """One network of the summary."""
    verdicts = verdicts_of(made.folder)
    told = [
        v.latency_ms is not None and (v.comparable_ms is not None or not job.device.at_hand) for v in verdicts.values()
    ]
    if set(verdicts) != set(job.files) or not all(told):
        raise damaged(made.folder / "verify.json", "a precision or its latency is missing", stage="verify")
    folder = made.folder.relative_to(job.path)
    graph = made.architecture.network.flat()

    def figures(precision: str) -> dict[str, Any]:
        v = verdicts[precision]
        assert v.latency_ms is not None
        name = file_name(precision, job.runtime.suffix)
        return {
            "file": str(folder / name) + ("" if v.passed else ".refused"),
            "accuracy": v.accuracy,
            "latency_ms": v.latency_ms.median,
            "comparable_ms": v.comparable_ms,
            "predicted_ms": v.latency_ms.predicted,
            "predicted_low_ms": v.latency_ms.predicted_low,
            "predicted_high_ms": v.latency_ms.predicted_high,
            "machine_level": v.machine_level,
            "size_bytes": v.size_bytes,
            "passed": v.passed,
        }

    return {
        "name": made.name,
        "role": made.role,
        "folder": str(folder),
        "genotype": list(made.architecture.genotype),
        "validation_accuracy": made.validation_accuracy,
        "macs": cost.macs(graph),
        "params": cost.parameters(graph),
        **figures(job.file),
        **{p: figures(p) for p in verdicts if p != job.file},
        **({} if "int8" in verdicts else {"int8": None}),
    }
