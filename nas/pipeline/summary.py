"""Stage 7: summary.json and report.html."""

import json
from typing import Any

from nas import cost
from nas.files import read_json, write_json
from nas.pipeline.export import file_name
from nas.pipeline.finish import Finished, finished
from nas.pipeline.job import Job
from nas.report import write_report


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
    sound = [e for e in winners if e["passed"]] or winners
    # Chosen by validation accuracy and predicted latency, neither of which is a test result or a noisy timing.
    winner = min(sound, key=lambda e: (-e["validation_accuracy"], e["predicted_ms"]))
    hand = next(e for e in baselines if e["role"] == "handmade")
    refused = [
        {"name": e["name"], "precision": precision, "reason": verdict["reason"]}
        for e in made
        for precision, verdict in read_json(job.path / e["folder"] / "verify.json").items()
        if not verdict["passed"]
    ]
    journal = job.path / "search" / "journal.jsonl"
    return {
        "name": job.experiment.name,
        "question": job.experiment.question,
        "precision": job.precision,
        "limit_ms": job.limit.ms,
        "limit": job.limit.asked,
        "reachable_ms": [job.limit.fastest_ms, job.limit.slowest_ms],
        "winner": winner,
        "winners": winners,
        "baselines": baselines,
        "beats_handmade": winner["accuracy"] > hand["accuracy"],
        "verdict": verdict_of(
            winner,
            hand,
            limit_ms=job.limit.ms,
            test_images=len(job.data.test.labels),
            trials=job.experiment.search.trials,
        ),
        "refused": refused,
        "trials": sum(1 for _ in journal.open()) - 1,
        "seconds": job.folder.seconds(),
    }


def verdict_of(winner: dict[str, Any], hand: dict[str, Any], *, limit_ms: float, test_images: int, trials: int) -> str:
    """The answer in words, whatever it is.

    Args:
        winner, hand: entries of summary.json: the answer, and the hand-made network.
        limit_ms: that was asked for.
        test_images: how many each accuracy was counted over.
        trials: of the search.
    """
    points = 100 * (winner["accuracy"] - hand["accuracy"])
    lead = (
        f"Best network within {limit_ms:.4g} ms: top-1 {winner['accuracy']:.2%} on {test_images} test images, "
        f"{winner['latency_ms']:.4g} ms measured ({winner['predicted_ms']:.4g} predicted), "
        f"{winner['size_bytes']:,} bytes."
    )
    over = winner["latency_ms"] / limit_ms - 1
    late = f" Measured, it is {over:.1%} over the limit." if over > 0 else ""
    level = winner["machine_level"] - 1  # since the table: anchors measured again beside the files
    if abs(level) > 0.05:
        late += f" The machine is {abs(level):.0%} {'slower' if level > 0 else 'faster'} now than for the prediction."
    if not winner["passed"]:
        late += " It did not pass verification, and should not be deployed."
    if winner["genotype"] == hand["genotype"]:
        return (
            f"{lead}{late} It IS the hand-made network: among {trials} trials the search found "
            f"none that does better on the validation images. More trials (search.trials) may."
        )
    compared = (
        f"{'beats' if points > 0 else 'equals' if points == 0 else 'does NOT beat'} the hand-made network "
        f"({hand['accuracy']:.2%} at {hand['latency_ms']:.4g} ms)"
    )
    images = round(abs(points) / 100 * test_images)
    by = f" by {abs(points):.2f} points ({images} images)" if points > 0 else ""
    short = f": it is {abs(points):.2f} points ({images} images) below" if points < 0 else ""
    faster = 1 - winner["latency_ms"] / hand["latency_ms"]
    speed = f", and is {abs(faster):.0%} {'faster' if faster > 0 else 'slower'}" if abs(faster) >= 0.005 else ""
    return f"{lead}{late} It {compared}{by}{short}{speed}."


def _entry(job: Job, made: Finished) -> dict[str, Any]:
    """One network of the summary."""
    verdict = json.loads((made.folder / "verify.json").read_text())
    folder = made.folder.relative_to(job.path)
    graph = made.architecture.network.flat()

    def figures(precision: str) -> dict[str, Any]:
        v = verdict[precision]
        return {
            "file": str(folder / file_name(precision, job.runtime.suffix)),
            "accuracy": v["accuracy"],
            "latency_ms": v["latency_ms"]["median"],
            "predicted_ms": v["latency_ms"]["predicted"],
            "machine_level": v["machine_level"],
            "size_bytes": v["size_bytes"],
            "passed": v["passed"],
        }

    return {
        "name": made.name,
        "role": made.role,
        "folder": str(folder),
        "genotype": list(made.architecture.genotype),
        "validation_accuracy": made.validation_accuracy,
        "macs": cost.macs(graph),
        "params": cost.parameters(graph),
        **figures(job.precision),
        **{p: figures(p) for p in verdict if p != job.precision},
        **({} if "int8" in verdict else {"int8": None}),
    }
