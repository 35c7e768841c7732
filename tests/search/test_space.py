"""The `search:` section: what it may hold, and every way in which it may be wrong, told at once."""

import pytest

from lorica.errors import ConfigError
from lorica.methods import WORDS
from lorica.search.samplers import drawn, fixed_points, grid, number_of
from lorica.search.space import Choices, Range, name_of, read_space, values_of


def space(section, method="lora", **given):
    return read_space(section, methods=WORDS, default_method=method, given=given)


def problems(section, **given):
    with pytest.raises(ConfigError) as caught:
        space(section, **given)
    return list(caught.value.problems)


def test_lists_and_ranges_become_axes_under_the_names_of_settings():
    found = space(
        {"rank": [4, 8], "lr": {"low": 1e-4, "high": 1e-3, "log": True}, "dropout": [0, 0.1]}
    )
    assert found.axes == (
        Choices("r", (4, 8)),
        Range("learning_rate", 1e-4, 1e-3, log=True),
        Choices("lora_dropout", (0, 0.1)),
    )
    assert found.sampler == "random" and number_of(found) == 16


def test_a_grid_has_every_combination_once():
    found = space({"r": [4, 8], "learning_rate": {"low": 1e-4, "high": 9e-4, "num": 3}})
    assert found.sampler == "grid" and number_of(found) == 6
    rates = [1e-4, 5e-4, 9e-4]
    assert grid(found) == [{"r": r, "learning_rate": rate} for r in (4, 8) for rate in rates]
    limited = space({"r": [4, 8, 16], "candidates": 2})
    assert fixed_points(limited, 0) == [{"r": 4}, {"r": 8}]


def test_what_a_method_does_not_take_is_left_out_of_its_candidates():
    found = space({"method": ["lora", "ia3", "dora"], "r": [4, 8]})
    assert grid(found) == [
        {"method": "lora", "r": 4},
        {"method": "lora", "r": 8},
        {"method": "ia3"},
        {"method": "dora", "r": 4},
        {"method": "dora", "r": 8},
    ]


def test_chance_draws_distinct_points_within_the_ranges_and_the_same_again():
    found = space(
        {"r": {"low": 2, "high": 64, "log": True}, "init": ["kaiming", "pissa"], "candidates": 12}
    )
    points = drawn(found, 12, seed=3)
    assert points == drawn(found, 12, seed=3) != drawn(found, 12, seed=4)
    assert len({tuple(point.items()) for point in points}) == 12
    assert all(isinstance(p["r"], int) and 2 <= p["r"] <= 64 for p in points)
    assert sum(p["r"] < 12 for p in points) > 3  # half of a logarithmic range lies below 11
    assert len(drawn(space({"r": [4, 8], "sampler": "random"}), 9, seed=0)) == 2


def test_alpha_may_be_a_multiple_of_the_rank():
    found = space({"r": [4, 5], "lora_alpha": ["2r", "r", "0.5r", 16]})
    points = grid(found)
    assert [values_of(p, None)["lora_alpha"] for p in points] == [8, 4, 2, 16, 10, 5, 2.5, 16]
    assert values_of({"lora_alpha": "2r"}, 8) == {"lora_alpha": 16}
    assert name_of(points[0]) == "rank 4, alpha 2r"


def test_every_problem_is_told_at_once_with_what_was_meant():
    found = problems(
        {
            "rnak": [4],
            "batch_size": [8, 16],
            "model": ["a"],
            "r": 8,
            "lora_alpha": [],
            "learning_rate": {"low": 1e-3, "hihg": 1e-2},
            "weight_decay": {"low": 0.2, "high": 0.1},
            "method": ["lora", "dorra"],
            "sampler": "gird",
            "keep": 1.5,
            "rungs": [0.5, 0.25],
        }
    )
    expected = (
        "rnak is not a setting; did you mean rank?",
        "batch_size is the same for all candidates, which see the same records",
        "model is the same for all candidates",
        "r is 8; expected a list of choices or a range",
        "lora_alpha is an empty list",
        "hihg is no part of a range (low, high, log, num); did you mean high?",
        "weight_decay: the range from 0.2 to 0.1 is none",
        "method: 'dorra' is no method; did you mean dora?",
        "sampler is 'gird'; expected one of grid, random, tpe",
        "keep is 1.5",
    )
    for text in expected:
        assert any(text in problem for problem in found), (text, found)
    assert all(problem.startswith("search: ") for problem in found)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({}, "nothing to search"),
        ([4, 8], "nothing to search"),
        ({"sampler": "random"}, "no setting to choose"),
        ({"sampler": "grid", "r": {"low": 4, "high": 8}}, "r is a range; give a list, or num: 4"),
        ({"r": {"low": 0, "high": 8, "log": True}}, "begins above 0"),
        ({"init": {"low": 0, "high": 8}}, "has no range; give a list"),
        ({"r": [4], "rank": [8]}, "rank is given twice, as r"),
        ({"r": [4], "rungs": [0.5, 0.25]}, "rising shares"),
    ],
)
def test_sections_that_cannot_be_searched(section, text):
    with pytest.raises(ConfigError) as caught:
        space(section)
    assert text in str(caught.value)


def test_a_setting_beside_the_section_that_it_chooses_is_refused():
    assert problems({"r": [4, 8]}, r="run.yaml:3") == [
        "search: r is set beside the section too (run.yaml:3), which would have no effect"
    ]
