import pytest

from crate_ray.analysis import aggregate_seeds, paired_t_interval


def test_recipes_are_averaged_and_their_differences_paired_by_seed(make_row):
    first, second = (0.90, 0.94, 0.92), (0.88, 0.93, 0.89)
    summary = aggregate_seeds(
        {
            seed: [
                make_row("a", top1=x, control=0.6, seeds=(seed,), rollbacks=seed, skipped_steps=5),
                make_row("b", top1=y, control=0.7, seeds=(seed,)),
            ]
            for seed, x, y in zip((1, 2, 3), first, second, strict=True)
        }
    )
    a, b = summary.rows
    assert a.probe_top1.value == pytest.approx(0.92)
    assert a.gain.low == pytest.approx(paired_t_interval([x - 0.6 for x in first]).low)
    assert b.control_top1 == pytest.approx(0.7)
    assert a.seeds == (1, 2, 3)
    assert (a.rollbacks, a.skipped_steps, b.rollbacks) == (6, 15, 0)
    (difference,) = summary.differences
    assert (difference.first, difference.second) == ("a", "b")
    assert difference.top1.mean == pytest.approx(0.02)
    assert difference.top1.high == pytest.approx(paired_t_interval([0.02, 0.01, 0.03]).high)


def test_a_recipe_missing_from_a_seed_is_refused(make_row):
    with pytest.raises(ValueError, match="pair every recipe"):
        aggregate_seeds({0: [make_row("a"), make_row("b")], 1: [make_row("a")]})


def test_one_seed_is_refused(make_row):
    with pytest.raises(ValueError, match="at least 2"):
        aggregate_seeds({0: [make_row("a")]})


def test_a_recipe_twice_in_a_seed_is_refused(make_row):
    with pytest.raises(ValueError, match="twice"):
        aggregate_seeds({0: [make_row("a"), make_row("a")]})
