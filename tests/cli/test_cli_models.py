import json

import pytest

from crate_ray.config import PRESETS, RunConfig
from crate_ray.models.cost import count_parameters


def test_every_preset_is_listed_with_its_costs(invoke):
    rows = json.loads(invoke("models", "--json").out)
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert all(row["parameters"]["encoder"] <= row["parameters"]["trainable"] for row in rows)


@pytest.mark.parametrize(("preset", "paper_millions"), [("crate_mae_base", 44.6), ("mae_base", 111.9), ("mae_small", 47.6)])
def test_the_paper_column_is_what_the_papers_print(invoke, preset, paper_millions):
    (row,) = json.loads(invoke("models", preset, "--json").out)
    assert round(row["parameters"]["paper"] / 1e6, 1) == paper_millions


def test_the_published_form_of_crate_costs_more_than_the_executed_one(invoke):
    (row,) = json.loads(invoke("models", "crate_mae_base", "--json").out)
    assert round(row["published_forward_flops"] / 1e9, 2) == 25.63
    assert row["forward_flops"] < row["published_forward_flops"]


def test_the_tables_hold_what_the_json_holds(invoke):
    result = invoke("models", "crate_mae_base", "crate_base")
    assert result.code == 0
    assert "44,638,464" in result.out
    assert "25.63" in result.out
    assert "mae_huge" not in result.out


def test_the_three_forms_of_the_forward_pass_and_the_encoder_are_columns(invoke):
    rows = {row["preset"]: row for row in json.loads(invoke("models", "crate_mae_base", "mae_base", "--json").out)}
    keys = ("published_forward_flops", "two_products_forward_flops")
    assert [round(rows["crate_mae_base"][key] / 1e9, 2) for key in keys] == [25.63, 22.85]
    assert [round(rows["mae_base"][key] / 1e9, 2) for key in keys] == [19.56, 19.56]
    out = invoke("models", "crate_mae_base").out
    for figure in ("25.63", "22.85", f"{rows['crate_mae_base']['forward_flops'] / 1e9:.2f}"):
        assert figure in out


@pytest.mark.parametrize(
    ("preset", "decoder_embed", "second_table"),
    [("crate_mae_small", 332_352, 113_472), ("mae_all_tokens_base", 590_592, 151_296), ("crate_mae_visible_base", 0, 0)],
)
def test_what_ours_lacks_of_the_published_class_is_said_in_numbers(invoke, preset, decoder_embed, second_table):
    (row,) = json.loads(invoke("models", preset, "--json").out)
    assert row["published_only_parameters"] == {"decoder_embed": decoder_embed, "second_table": second_table}
    assert row["parameters"]["paper"] - row["parameters"]["total"] == decoder_embed + second_table
    out = invoke("models", preset).out
    assert (f"-{decoder_embed:,}" in out) == (decoder_embed > 0)
    assert "ours lacks decoder_embed, which no gradient reaches" in out


def test_memory_is_what_an_image_adds_and_what_is_there_once(invoke):
    (row,) = json.loads(invoke("models", "crate_mae_base", "--json").out)
    assert row["training_state_bytes"] == 16 * row["parameters"]["trainable"]
    sizes = row["activation_bytes_per_image"]
    assert sizes["bfloat16"] < sizes["float32"] < 2 * sizes["bfloat16"]
    out = invoke("models", "crate_mae_base").out
    assert f"{sizes['float32'] / 2**20:,.1f}" in out
    assert f"{row['training_state_bytes'] / 2**20:,.1f}" in out


def test_a_shape_of_ones_own_is_priced(invoke):
    changes = ("--set", "model.width=512", "--set", "model.num_heads=8", "--set", "model.encoder_depth=6")
    (row,) = json.loads(invoke("models", "crate_mae_base", *changes, "--json").out)
    layer = 3 * 512 * 512 + 5 * 512
    ends = (768 * 512 + 512) + 512 + 2 * 512
    assert row["parameters"]["encoder"] == 6 * layer + ends
    assert "model.width=512, model.num_heads=8" in invoke("models", "crate_mae_base", *changes).out


def test_a_recipe_is_priced_by_its_name_and_by_its_path(invoke, tmp_path):
    (row,) = json.loads(invoke("models", "digits_mae", "--json").out)
    assert row["parameters"]["trainable"] == count_parameters(RunConfig.load("digits_mae").model).trainable
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: {preset: mae_small, image_size: 96}\ndata: {train: shards}\n"
        "optimizer: {lr: 1e-3}\ntrain: {steps: 2, global_batch: 8}\n"
    )
    (row,) = json.loads(invoke("models", path, "--set", "model.patch_size=8", "--json").out)
    assert (row["image_size"], row["patch_size"]) == (96, 8)


@pytest.mark.parametrize("arguments", [(), ("crate_mae_large", "mae_huge", "quickstart")])
def test_the_screen_fits_into_a_hundred_columns(invoke, arguments):
    assert max(len(line.rstrip()) for line in invoke("models", *arguments).out.splitlines()) <= 100


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.mask_ratio=1.0", "mask_ratio = 1.0 keeps 0 of 196 patches"),
        ("model.mask_ratio=0", "mask_ratio = 0.0 keeps 196 of 196 patches"),
        ("model.mask_ratio=.nan", "mask_ratio = nan: input should be a finite number"),
        ("model.image_size=8", "image_size = 8 is smaller than one patch of patch_size = 16"),
        ("model.image_size=16", "image_size = 16 is one patch"),
        ("model.num_heads=7", "width = 768 is not divisible by num_heads = 7"),
        ("model.ista_lambda=[0.1, 0.5]", "ista_lambda has 2 values; give one, or one for each of the 12 layers"),
        ("model.ista_step_size=-0.1", "ista_step_size = -0.1: give a finite number of at least 0"),
        ("model.widht=8", "did you mean 'width'?"),
        ("train.steps=8", "write model.KEY=VALUE"),
        ("model.width", "expected key=value"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_message(invoke, change, expected):
    result = invoke("models", "crate_mae_base", "--set", change)
    assert result.code == 2
    assert expected in " ".join(result.err.split())
    assert (result.out, "Traceback" in result.err) == ("", False)


def test_an_unknown_preset_is_refused_with_the_valid_ones(invoke):
    result = invoke("models", "crate_mae_bse")
    assert result.code == 2
    assert "did you mean 'crate_mae_base'?" in result.err
    assert "Traceback" not in result.err
