"""The verdict says what the figures say, favourable or not."""

from typing import Any

import pytest

from nas.pipeline.summary import verdict_of


def entry(**changes: Any) -> dict[str, Any]:
    base = {
        "accuracy": 0.9,
        "latency_ms": 1.0,
        "comparable_ms": 1.0,
        "predicted_ms": 1.0,
        "machine_level": 1.0,
        "size_bytes": 1000,
        "passed": True,
        "genotype": [1],
    }
    return {**base, **changes}


def said(winner: dict[str, Any], hand: dict[str, Any]) -> str:
    return verdict_of(winner, hand, limit_ms=2.0, test_images=200, trials=64)


@pytest.mark.parametrize(
    ("winner", "hand", "words"),
    [
        ({}, {"accuracy": 0.89, "genotype": [2]}, "beats the hand-made network (89.00% at 1 ms) by 1.00 points (2"),
        ({}, {"accuracy": 0.91, "genotype": [2]}, "does NOT beat the hand-made network (91.00% at 1 ms): it is 1.00"),
        ({}, {"genotype": [2]}, "It equals the hand-made network (90.00% at 1 ms)."),
        ({"comparable_ms": 0.5}, {"genotype": [2]}, ", and is 50% faster."),
        ({"comparable_ms": 1.5}, {"genotype": [2]}, ", and is 50% slower."),
        ({}, {}, "It IS the hand-made network: among 64 trials"),
        ({"comparable_ms": 2.1}, {"genotype": [2]}, " That is 5.0% over the limit."),
        ({"machine_level": 1.2}, {"genotype": [2]}, "The machine is 20% slower now than when its table was measured"),
        ({"machine_level": 0.8}, {"genotype": [2]}, "The machine is 20% faster now than when its table was measured"),
        ({"passed": False}, {"genotype": [2]}, "NO network passed verification; do not deploy this one. Best"),
    ],
)  # fmt: skip
def test_the_verdict_says_so(winner: dict[str, Any], hand: dict[str, Any], words: str) -> None:
    text = said(entry(**winner), entry(**hand))
    assert words in text
    assert "Best network within 2 ms: top-1 90.00% on 200 test images, " in text


def test_nothing_else_is_said_of_a_winner_within_the_limit() -> None:
    text = said(entry(), entry(accuracy=0.89, genotype=[2]))
    for word in ("over the limit", "machine", "verification", "NOT"):
        assert word not in text
