"""The pictures of a comparison: what they show, and that names do not lie upon each other."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from comparison_values import make_comparison, make_configuration, make_difference
from matplotlib.text import Text

from crate_ray.analysis.comparison.canvas import NARROW, WIDE, drawing, model_style
from crate_ray.analysis.comparison.figures import plan
from crate_ray.analysis.comparison.panels import plot_differences, plot_layers, plot_sensitivity, shown_differences
from crate_ray.analysis.comparison.result import Finding
from crate_ray.analysis.comparison.scatter import ALL_IN_DETAIL, COSTS, MOST_LEADING, log_ticks, plot_cost
from crate_ray.runs.rows import Estimate

ENCODER, TOTAL, PFLOPS, HOURS = COSTS


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def many(count=60):
    models = ("crate_mae", "mae", "mae_all_tokens")
    return [
        make_configuration(models[i % 3], (2 + i // 3, 64), 1e5 * 1.25 ** (i // 3), 0.8 + 0.002 * i, seeds=2)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("low", "high"), [(0.2, 30), (0.69, 0.93), (1e-4, 2e3), (3, 5), (0.0123, 0.0124), (1, 10), (900, 1_100_000)]
)
def test_ticks_of_a_logarithmic_axis_are_round_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    if high / low > 1.2:
        assert len(ticks) >= 3
    assert ticks == sorted(ticks)
    if len(ticks) > 1:
        assert all(low <= tick <= high for tick in ticks)
        assert all(len(f"{tick:.10g}".strip("0").replace(".", "").strip("0")) <= 2 for tick in ticks)


def test_both_baselines_are_named_and_one_that_is_missing_is_said_to_be():
    assert {"CRATE-MAE", "MAE (facebook)", "MAE (CRATE repository)"} <= set(
        legend_of(plot_cost(make_comparison(), ENCODER, WIDE))
    )
    items = [item for item in make_comparison().configurations if item.model != "mae_all_tokens"]
    without = plot_cost(make_comparison(items), ENCODER, WIDE)
    assert "MAE (CRATE repository): not in this comparison" in legend_of(without)


def test_models_differ_in_marker_as_well_as_in_colour():
    styles = [
        model_style(*model) for model in (("crate_mae", "crate"), ("mae", "vit"), ("mae_all_tokens", "vit"), ("x", "vit"))
    ]
    assert len({style.marker for style in styles}) == len(styles)
    assert styles[0].colour == "#d55e00"
    assert styles[1].colour == "#0072b2"


def test_points_stand_at_their_means_and_controls_below_in_a_strip():
    comparison = make_comparison()
    main, strip = plot_cost(comparison, TOTAL, WIDE).axes
    drawn = {(round(x, 3), round(y, 3)) for line in main.lines for x, y in zip(*line.get_data(), strict=True)}
    for item in comparison.configurations:
        near = [y for x, y in drawn if abs(math.log(x / (item.params_total / 1e6))) < 0.1]
        assert any(math.isclose(y, 100 * item.metric.value, abs_tol=2e-3) for y in near)
    assert main.get_ylim()[0] > 80  # not pressed flat by the controls at 55
    assert strip.get_ylabel() == "untrained"
    heights = {y for line in strip.lines for y in line.get_ydata()}
    assert any(math.isclose(y, 55) for y in heights)
    assert any(math.isclose(y, 62) for y in heights)  # raw pixels


def test_controls_near_the_models_share_their_panel():
    items = [replace(item, control=item.metric.value - 0.005) for item in make_comparison().configurations]
    assert len(plot_cost(make_comparison(items, raw_pixels=None), ENCODER, WIDE).axes) == 1


def test_interval_ends_of_two_seeds_do_not_stretch_the_axis():
    items = [replace(item, metric=item.metric._replace(low=0.1, high=1.5)) for item in many(6)]
    low, high = plot_cost(make_comparison(items, raw_pixels=None), ENCODER, WIDE).axes[0].get_ylim()
    assert high - low < 10


@pytest.mark.parametrize("page", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("count", [7, 60])
def test_names_lie_upon_no_other_and_inside_the_panel(page, count):
    items = make_comparison().configurations if count == 7 else many(count)
    figure = plot_cost(make_comparison(list(items)), ENCODER, page)
    main = figure.axes[0]
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for text in main.texts]  # without the line to the point
    assert len(boxes) >= (5 if count == 7 else 3)
    panel = main.get_window_extent()
    for index, box in enumerate(boxes):
        assert panel.x0 - 1 <= box.x0
        assert box.x1 <= panel.x1 + 1
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_of_very_many_configurations_all_have_a_point_and_the_leading_ones_an_interval():
    comparison = make_comparison(many(ALL_IN_DETAIL + 1), curves=())
    main = plot_cost(comparison, ENCODER, NARROW).axes[0]
    means = [line for line in main.lines if line.get_marker() in ("o", "s", "D") and line.get_markerfacecolor() != "none"]
    assert sum(len(line.get_xdata()) for line in means) == ALL_IN_DETAIL + 1
    assert sum(len(bars.get_segments()) for bars in main.collections) == 2  # the best of each family
    assert f"drawn of the best of each family and of those on a front alone, {MOST_LEADING} at most" in (
        plan(comparison)["encoder_params"].caption
    )
    few = plan(make_comparison(many(ALL_IN_DETAIL), curves=()))["encoder_params"].caption
    assert "alone" not in few


def test_differences_are_filled_only_where_the_corrected_test_tells_them_apart():
    crate, mae = make_configuration("crate_mae", (4, 128), 3e5, 0.9), make_configuration("mae", (4, 80), 3e5, 0.88)
    interval = Estimate(0.02, 0.01, 0.03)
    shown = (
        make_difference(crate, mae, interval=interval, p_holm=0.01),
        make_difference(crate, mae, interval=interval, p_holm=0.06),
        make_difference(crate, mae, interval=interval, p_holm=0.01, why_no_verdict="unequal tuning"),
        make_difference(crate, mae, "flops", interval=None),
    )
    figure = plot_differences(make_comparison([crate, mae], differences=shown, curves=()), WIDE)
    faces = [line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() in ("o", "s")]
    assert faces == ["#d55e00", "#ffffff", "#ffffff"]
    written = texts(figure)
    assert "At equal encoder parameters" in written
    assert "At equal training FLOPs" not in written  # it has no interval
    assert "+2.0 [+1.0, +3.0], 5 pairs, Holm p 0.010" in written


def test_many_differences_share_the_room_among_the_axes():
    crate, mae = make_configuration("crate_mae", (4, 128), 3e5, 0.9), make_configuration("mae", (4, 80), 3e5, 0.88)
    shown = tuple(make_difference(crate, mae, axis) for axis in ("params", "flops", "time") for _ in range(30))
    comparison = make_comparison([crate, mae], differences=shown, curves=())
    assert [len(items) for items in shown_differences(comparison).values()] == [8, 8, 8]
    assert "24 of 90" in plan(comparison)["differences"].caption


def test_exploratory_sensitivity_is_hollow_and_judged_on_validation():
    figure = plot_sensitivity(make_comparison(), WIDE)
    first, second = figure.axes
    assert first.get_ylabel().replace("\n", " ") == "linear probe top-1 on validation (%)"
    assert second.get_ylabel().replace("\n", " ") == "linear probe top-1 on test (%)"
    assert first.lines[0].get_markerfacecolor() == "#ffffff"
    assert second.lines[0].get_markerfacecolor() == "#d55e00"
    assert [tick.get_text() for tick in second.get_xticklabels()] == ["0.05", "0.1", "0.2"]


def test_layers_are_dashed_at_initialisation():
    rates, shares = plot_layers(make_comparison(), NARROW).axes
    assert [line.get_linestyle() for line in rates.lines] == ["-", "--"]
    assert list(rates.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert math.isnan(shares.lines[0].get_ydata()[2])


def test_what_is_not_there_has_a_sentence_and_no_picture():
    items = [make_configuration(model, (4, 128), 3e5, 0.9, seeds=1, timing=None) for model in ("crate_mae", "mae")]
    plans = plan(make_comparison(items, layers=(), sensitivities=(), differences=(), curves=()))
    absent = {name: text for name, text in plans.items() if isinstance(text, str)}
    assert set(absent) == {"hours", "differences", "sensitivity", "layers"}
    assert "crate-ray time RUN..." in absent["hours"]
    assert "Each point is one run;" in plans["encoder_params"].caption
    assert "One seed tells nothing of the luck of training." in plans["encoder_params"].caption


def test_times_of_different_hardware_are_not_drawn_and_refused_keys_are_named():
    findings = (
        Finding("refused", "hardware", {"a": ("x",), "b": ("y",)}, "They were timed on different hardware."),
        Finding("refused", "data.digest", {"a": ("x",), "b": ("y",)}, "The data differ."),
    )
    plans = plan(make_comparison(findings=findings))
    assert plans["hours"] == "No picture against time: They were timed on different hardware."
    assert "`data.digest`" in plans["encoder_params"].caption


def test_names_with_formulas_and_foreign_letters_are_drawn_as_they_are():
    labels = ("cost $x^2$ $", "名前 <b> & \x00 long " + "y" * 60)
    items = [make_configuration("crate_mae", (i, 64), 1e5 * (i + 1), 0.9, label=label) for i, label in enumerate(labels)]
    comparison = make_comparison([*items, make_configuration("mae", (4, 80), 3e5, 0.89)], curves=())
    item = drawing("x", lambda page: plot_cost(comparison, ENCODER, page), title="t", caption="c", alt='an "alt" <b>', dpi=40)
    words = "".join(ElementTree.fromstring(item.svg).itertext())
    assert "cost $x^2$ $" in words
    assert "名前 <b> & long yy" in words
    assert 'aria-label="an &quot;alt&quot; &lt;b&gt;"' in item.wide
