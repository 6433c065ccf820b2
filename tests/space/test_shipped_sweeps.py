"""Every shipped sweep, whole and in its small size: what its header says is what its plan holds."""

import re
from functools import cache
from pathlib import Path

import pytest

from crate_ray.config import RunConfig, Stage, SweepConfig, is_exploratory
from crate_ray.models.cost import count_parameters, encode_flops, forward_flops
from crate_ray.space import ArmSpace, Plan, Point, check_sweep, make_plan, make_planner, quantities

FOLDER = Path(__file__).resolve().parents[2] / "sweeps"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SHIPPED = {
    "ablation",
    "depth_width",
    "digits_frontier",
    "digits_show",
    "iso_flops",
    "iso_params",
    "ista",
    "lr_width",
    "mask_ratio",
    "smoke",
}
COST = re.compile(
    r"# Cost: ([\d,]+) screening trials, ([\d.,]+)M images, ([\d.,]+) PFLOPs; "
    r"(?:nothing is confirmed|then (\d+) confirming runs, up to ([\d.,]+) PFLOPs)\."
)


@cache
def load(name: str, *, smoke: bool = False) -> SweepConfig:
    return SweepConfig.load(str(FOLDER / f"{name}.yaml"), smoke=smoke)


@cache
def plan(name: str, *, smoke: bool = False) -> Plan:
    return make_plan(load(name, smoke=smoke))


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def number(text: str) -> float:
    return float(text.replace(",", ""))


@cache
def runs(name: str, arm: str, *, smoke: bool = False, stage: Stage = "screen") -> list[tuple[Point, RunConfig]]:
    space = ArmSpace(load(name, smoke=smoke), arm, stage=stage)
    return [(point, space.config(point.values)) for point in plan(name, smoke=smoke).points[arm]]


def pflops(name: str, arm: str, stage: Stage = "screen") -> list[tuple[str, float]]:
    """(point without what is tuned, PFLOPs of a run) of every point of an arm."""
    tuned = load(name).tune
    return [
        (repr({key: value for key, value in point.values.items() if key not in tuned}), quantities(config)["train_pflops"])
        for point, config in runs(name, arm, stage=stage)
    ]


def test_the_folder_holds_the_sweeps_that_the_documents_name() -> None:
    assert set(NAMES) == SHIPPED


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_is_sound_and_nothing_of_it_is_refused(name: str, smoke: bool) -> None:
    sweep = load(name, smoke=smoke)
    check_sweep(sweep)
    planner = make_planner(sweep)
    assert planner.refused == {}
    assert planner.total == sum(len(points) for points in plan(name, smoke=smoke).points.values())
    assert all(match.is_within for match in planner.matches)
    first = planner.ask()
    assert first is not None
    assert first.arm == next(iter(plan(name, smoke=smoke).points))


@pytest.mark.parametrize("name", NAMES)
def test_a_header_opens_with_the_command_and_says_what_it_costs_and_what_is_unknown(name: str) -> None:
    text = header(name)
    assert f"crate-ray sweep sweeps/{name}.yaml" in text
    assert "# Expect: " in text
    assert "# Unknown: " in text
    assert (is_exploratory(load(name)) is not None) == ("exploratory" in text)
    assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_of_a_header_is_that_of_its_plan(name: str) -> None:
    sweep, match = load(name), COST.search(header(name))
    assert match is not None
    trials, images, screening, confirming, confirming_pflops = match.groups()
    screened = {arm: pflops(name, arm) for arm in plan(name).points}
    assert number(trials) == sum(map(len, screened.values()))
    assert number(screening) == pytest.approx(sum(cost for arm in screened.values() for _, cost in arm), rel=0.05)
    trains = [config.train for arm in screened for _, config in runs(name, arm)]
    assert number(images) == pytest.approx(sum((train.steps or 0) * train.global_batch for train in trains) / 1e6, rel=0.05)
    if sweep.confirm is None:
        assert confirming is None
        return
    dearest: dict[tuple[str, str], float] = {}
    for arm in screened:
        for group, cost in pflops(name, arm, "confirm"):
            key = (arm, group if sweep.confirm.per == "point" else "")
            dearest[key] = max(cost, dearest.get(key, 0))
    assert int(confirming) == sweep.confirm.seeds * sweep.confirm.top_k * len(dearest)
    assert number(confirming_pflops) == pytest.approx(sweep.confirm.seeds * sum(dearest.values()), rel=0.05)


def test_what_evaluation_adds_to_the_mask_ratios_is_what_the_header_says() -> None:
    match = re.search(r"Evaluation adds ([\d.]+)%", header("mask_ratio"))
    assert match is not None
    trained, evaluated = 0.0, 0.0
    for arm in plan("mask_ratio").points:
        for _, config in runs("mask_ratio", arm):
            assert config.train.steps is not None
            assert config.eval.max_images is not None
            reports = -(-config.train.steps // load("mask_ratio").report_every_steps)
            losses = config.eval.max_images * forward_flops(config.model) * len(config.eval.mask_ratios or ())
            features = (config.eval.knn_images + config.eval.max_images) * encode_flops(config.model)
            evaluated += reports * (losses + features)
            trained += config.train.steps * config.train.global_batch * 3 * forward_flops(config.model)
    assert 100 * evaluated / trained == pytest.approx(number(match.group(1)), abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_has_as_many_trials_and_the_same_rates(name: str) -> None:
    sweep = load(name)
    assert len({len(points) for points in plan(name).points.values()}) == 1
    assert is_exploratory(sweep) is None
    assert all(not set(sweep.domains_of(arm)) & {"optimizer.lr", "optimizer.base_lr"} - set(sweep.tune) for arm in sweep.arms)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_size_runs_on_the_digits_and_two_cores_in_about_a_minute(name: str) -> None:
    sweep = load(name, smoke=True)
    total = 0
    for arm in plan(name, smoke=True).points:
        for _, config in runs(name, arm, smoke=True):
            assert (config.data.train, config.data.eval) == ("data/digits/train", "data/digits/validation")
            assert not config.scale.use_gpu
            assert config.train.steps is not None
            assert config.train.steps <= 60
            assert forward_flops(config.model) * config.train.global_batch * config.train.steps < 5e10
            total += 1
    assert 2 <= total <= (11 if name == "ablation" else 4)
    assert sweep.confirm is None
    assert (sweep.resources_per_trial.cpus, sweep.resources_per_trial.num_workers) == (1, 1)


@pytest.mark.parametrize("name", ["iso_params", "iso_flops"])
def test_pairs_are_equal_within_5_percent(name: str) -> None:
    sweep = load(name)
    assert sweep.match is not None
    for (one, crate), (other, mae) in zip(runs(name, "crate"), runs(name, "mae"), strict=True):
        assert all(one.values[key] == other.values[key] for key in sweep.tune)
        sizes = [count_parameters(c.model).encoder if name == "iso_params" else forward_flops(c.model) for c in (crate, mae)]
        assert abs(sizes[1] / sizes[0] - 1) <= 0.05


def test_the_published_pair_is_among_those_of_equal_parameters() -> None:
    pairs = zip(runs("iso_params", "crate"), runs("iso_params", "mae"), strict=True)
    papers = {tuple(round(count_parameters(config.model).paper / 1e6, 1) for _, config in pair) for pair in pairs}
    assert (44.6, 47.6) in papers


def test_the_matched_arms_of_the_ablation_have_the_encoder_of_the_crate() -> None:
    sweep = load("ablation")
    encoders = {arm: count_parameters(ArmSpace(sweep, arm).config({}).model).encoder for arm in sweep.arms}
    matched = [arm for arm in sweep.arms if arm.endswith(("_matched", "_narrow"))]
    assert len(matched) == 4
    for arm in matched:
        assert abs(encoders[arm] / encoders["tied_ista"] - 1) <= 0.05
    assert encoders["untied_mlp"] / encoders["tied_ista"] == pytest.approx(3.9, abs=0.05)


def test_arms_of_equal_flops_spend_the_same_at_every_mask_ratio() -> None:
    equal = [cost for _, cost in pflops("mask_ratio", "mae_equal_flops")]
    assert max(equal) / min(equal) < 1.001
    by_images = [cost for _, cost in pflops("mask_ratio", "mae")]
    assert max(by_images) / min(by_images) > 2


def test_step_times_lambda_is_the_threshold_of_the_arm() -> None:
    for arm, points in plan("ista").points.items():
        for point in points:
            threshold = point.values["model.ista_step_size"] * point.values["model.ista_lambda"]
            assert threshold == pytest.approx(int(arm.removeprefix("threshold_")) / 100, rel=1e-5)


def test_the_decoder_of_the_depth_sweep_is_as_its_arms_say() -> None:
    models = {arm: [config.model for _, config in runs("depth_width", arm)] for arm in load("depth_width").arms}
    assert all(model.decoder_depth == model.encoder_depth for model in models["crate"])
    assert {model.decoder_depth for arm in ("crate_decoder8", "mae") for model in models[arm]} == {8}
