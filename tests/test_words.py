"""Numbers in words."""

import pytest

from nas import words
from nas.ops import Block, Graph


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (words.percent(0.98125), "98.1 %"),
        (words.percent(0.02, sign=True), "+2.0 %"),
        (words.percent(None), "–"),
        (words.percent(float("nan")), "–"),
        (words.ms(0.1844), "0.184 ms"),
        (words.ms(0.0096), "0.00960 ms"),
        (words.ms(12.345), "12.3 ms"),
        (words.ms(1234.5), "1234 ms"),
        (words.ms(0.0), "0 ms"),
        (words.ms(0.0096, like=0.17, unit=False), "0.010"),
        (words.count(999), "999"),
        (words.count(1_234_567), "1.23 M"),
        (words.count(999_999), "1 M"),
        (words.count(9.33e5), "933 k"),
        (words.size(512), "512 B"),
        (words.size(59_120), "59.1 kB"),
        (words.size(None), "–"),
        (words.seconds(0.42), "0.42 s"),
        (words.seconds(59.7), "1 min 0 s"),
        (words.seconds(75), "1 min 15 s"),
        (words.seconds(7_385), "2 h 3 min"),
    ],
)
def test_numbers_are_short_and_carry_their_unit(said, wanted):
    assert said.replace("\N{NO-BREAK SPACE}", " ") == wanted


def test_the_interval_of_a_share_holds_it_and_narrows_with_more_images():
    few, many = words.wilson(0.98, 100), words.wilson(0.98, 10_000)
    assert 0 < few[0] < many[0] < 0.98 < many[1] < few[1] < 1
    assert words.wilson(1.0, 100)[1] == pytest.approx(1.0)


def test_a_block_is_told_by_its_type_and_by_what_is_not_usual_about_it():
    label = "mbconv act=relu expand=6 kernel=5 rank=1.0 se=true"
    block = Block("stage1/layer2/mbconv_2", label, Graph((4, 4, 8)))
    assert words.kind(block) == "mbconv"
    assert words.options(block) == ["5×5", "expand 6", "SE"]
    low = Block("stage1/layer2/mbconv", label.replace("1.0", "0.5"), Graph((4, 4, 8)))
    assert words.options(low) == ["5×5", "expand 6", "rank 0.5", "SE"]
