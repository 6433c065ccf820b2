"""The planner of a list: arms in turns, each point once, and after a cut exactly the rest."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import SweepConfig
from crate_ray.space import Planner, Point, make_planner

Make = Callable[..., SweepConfig]
SPACE = {"model.width": {"grid": [32, 64, 96]}}
TUNE = {"optimizer.lr": {"grid": [1e-3, 3e-3]}}
RANDOM = {"search": {"method": "random"}, "tune": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}}}


def ask_all(planner: Planner) -> list[Point]:
    points = []
    while (point := planner.ask()) is not None:
        points.append(point)
    assert planner.is_exhausted
    return points


def test_arms_take_turns_until_all_points_were_handed_out(sweep_of: Make) -> None:
    planner = make_planner(sweep_of(space=SPACE, tune=TUNE))
    points = ask_all(planner)
    assert planner.total == len(points) == 12
    assert [point.arm for point in points] == ["mae", "crate"] * 6
    assert [point.values for point in points[::2]] == [point.values for point in points[1::2]]
    assert planner.ask() is None


def test_an_arm_with_more_points_goes_on_alone(sweep_of: Make) -> None:
    arms = {"mae": {"space": {"model.width": {"grid": [32]}}}, "crate": {"base": "digits_crate_mae"}}
    points = ask_all(make_planner(sweep_of(space=SPACE, arms=arms)))
    assert [point.arm for point in points] == ["mae", "crate", "crate", "crate"]


def test_the_budget_cuts_the_list_and_not_one_arm(sweep_of: Make) -> None:
    planner = make_planner(sweep_of(space=SPACE, tune=TUNE, budget={"trials": 5}))
    assert planner.total == 5
    assert [point.arm for point in ask_all(planner)] == ["mae", "crate", "mae", "crate", "mae"]


def test_a_random_search_shares_its_budget_and_a_population_ignores_it(sweep_of: Make) -> None:
    assert make_planner(sweep_of(**RANDOM, budget={"trials": 7})).total == 7
    population = {"type": "pbt", "perturb": TUNE, "interval_steps": 20, "population": 3}
    assert make_planner(sweep_of(**RANDOM, scheduler=population)).total == 6


@given(cut=st.integers(0, 12), ended=st.sets(st.integers(0, 11)), is_random=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_session_cut_anywhere_is_asked_for_exactly_the_rest(
    sweep_of: Make, cut: int, ended: set[int], is_random: bool
) -> None:
    sweep = sweep_of(**RANDOM, budget={"trials": 12}) if is_random else sweep_of(space=SPACE, tune=TUNE)
    whole = ask_all(make_planner(sweep))
    first = make_planner(sweep)
    begun = [first.ask() for _ in range(cut)]
    done = [
        (Point.of(point.as_dict()), {"eval_loss": 1.0} if i % 2 else None) for i, point in enumerate(whole[:cut]) if i in ended
    ]
    assert begun == whole[:cut]
    second = make_planner(sweep)
    second.restore(done)
    finished = {point.key for point, _ in done}
    assert ask_all(second) == [point for point in whole if point.key not in finished]


def test_with_nothing_that_varies_each_arm_has_one_point(sweep_of: Make) -> None:
    points = ask_all(make_planner(sweep_of(confirm={"seeds": 5}, screen={"seed": 3})))
    assert points == [Point("mae", {}, 3), Point("crate", {}, 3)]
