"""Weights from files: every layout, and every way to be refused."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.export import published_state
from crate_ray.models.weight_files import encode_safetensors
from crate_ray.models.weights import LoadedWeights

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE: dict[str, Any] = {
    "family": "crate",
    "image_size": 32,
    "patch_size": 8,
    "width": 48,
    "num_heads": 3,
    "encoder_depth": 2,
    "decoder_depth": 2,
}


def build(seed: int = 0, **overrides: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = create_model(ModelConfig.parse({**SHAPE, **overrides}))
    assert isinstance(model, MaskedAutoencoder)
    return model


def published() -> dict[str, Tensor]:
    with safe_open(GOLDEN / "crate_mae_a.safetensors", "pt") as file:
        return {key.removeprefix("param."): file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118


def same(first: MaskedAutoencoder, second: MaskedAutoencoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_our_own_weights_survive_a_file(tmp_path: Path, suffix: str) -> None:
    path, source, target = tmp_path / f"weights{suffix}", build(1), build(2)
    if suffix == ".pth":
        torch.save(source.state_dict(), path)
    else:
        safetensors.torch.save_file(source.state_dict(), path)
    assert not same(source, target)
    load_weights(target, str(path))
    assert same(source, target)


@pytest.mark.parametrize("wrapping", ["model", "state_dict", "module."])
def test_published_weights_load_from_a_training_checkpoint(tmp_path: Path, wrapping: str) -> None:
    state = published()
    wrapped = {f"module.{k}": v for k, v in state.items()} if wrapping == "module." else {wrapping: state, "epoch": 799}
    torch.save(wrapped, tmp_path / "checkpoint.pth")
    plain, from_file = build(1), build(2)
    load_weights(plain, state)
    load_weights(from_file, str(tmp_path / "checkpoint.pth"))
    assert same(plain, from_file)


def test_published_weights_leave_trained_ista_scalars_as_configured() -> None:
    model = build(ista_learnable="layer", ista_lambda=[0.1, 0.5])
    load_weights(model, published())
    lambdas = [float(block.ista.lam.detach()) for block in model.blocks]  # type: ignore[union-attr,operator]
    assert lambdas == pytest.approx([0.1, 0.5])


def test_every_difference_is_listed_in_one_error_and_nothing_is_loaded() -> None:
    state = published()
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    state["mask_token"] = torch.zeros(1, 1, 40)
    model, untouched = build(1), build(1)
    with pytest.raises(ConfigError) as caught:
        load_weights(model, state)
    message = str(caught.value)
    assert "missing: norm.weight" in message
    assert "extra: surplus" in message
    assert "mask_token is (1, 1, 40), the model has (1, 1, 48)" in message
    assert same(model, untouched)


def test_a_long_list_of_differences_is_cut_with_a_count() -> None:
    with pytest.raises(ConfigError, match=r"and \d+ more"):
        load_weights(build(encoder_depth=9), published())


def test_keys_of_no_known_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="no known layout"):
        load_weights(build(), {"backbone.conv1.weight": torch.zeros(3)})


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": published(), "hook": os.system}, tmp_path / "stranger.pth")
    with pytest.raises(ConfigError, match=r"hold Python objects \(posix\.system\), which are never loaded") as caught:
        load_weights(build(), str(tmp_path / "stranger.pth"))
    assert "weights_only" not in str(caught.value)


def test_a_checkpoint_with_the_arguments_of_its_training_loads(tmp_path: Path) -> None:
    """As the published `save_model` writes it."""
    arguments = argparse.Namespace(lr=1.5e-4, model="mae_vit_base_patch16", resume="", betas=[0.9, 0.95])
    body = {"model": published(), "optimizer": {"state": {}}, "epoch": 799, "scaler": {"scale": 65536.0}, "args": arguments}
    torch.save(body, tmp_path / "checkpoint-799.pth")
    plain, from_file = build(1), build(2)
    load_weights(plain, published())
    load_weights(from_file, str(tmp_path / "checkpoint-799.pth"))
    assert same(plain, from_file)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_folder_is_told_from_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"are a folder; .*crate-ray export"):
        load_weights(build(), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"), [("a.safetensors", b"nonsense"), ("a.pth", b"nonsense"), ("a.bin", b""), ("b.pth", None)]
)
def test_files_that_are_no_weights_are_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        load_weights(build(), str(tmp_path / name))


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="hold a list, not a state dict"):
        load_weights(build(), str(tmp_path / "list.pth"))


def golden(name: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        state = {key.removeprefix("param."): file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118
    return ModelConfig.parse({key: value for key, value in case.items() if key in ModelConfig.model_fields}), state


def facebook_encoder() -> tuple[ModelConfig, dict[str, Tensor]]:
    """What facebookresearch/mae publishes as `mae_pretrain_vit_base.pth`: no decoder, no mask token."""
    config, state = golden("vit_mae_facebook")
    return config, {k: v for k, v in state.items() if not k.startswith("decoder_") and k != "mask_token"}


def facebook_finetuned(num_classes: int = 7) -> dict[str, Tensor]:
    """What its fine-tuning saves: the head reads the mean token through `fc_norm`, and there is no `norm`."""
    _, state = facebook_encoder()
    width = state["cls_token"].shape[-1]
    kept = {key: value for key, value in state.items() if not key.startswith("norm.")}
    head = {"head.weight": torch.randn(num_classes, width), "head.bias": torch.randn(num_classes)}
    return {**kept, "fc_norm.weight": torch.rand(width) + 0.5, "fc_norm.bias": torch.randn(width), **head}


def vit_classifier(**overrides: Any) -> Classifier:
    config, _ = golden("vit_mae_facebook")
    shape = {key: getattr(config, key) for key in ("family", "image_size", "patch_size", "width", "num_heads", "encoder_depth")}
    torch.manual_seed(3)
    model = create_model(ModelConfig.parse({**shape, "num_classes": 7, **overrides}))
    assert isinstance(model, Classifier)
    return model


def save_ours(path: Path, model: MaskedAutoencoder | Classifier) -> str:
    path.write_bytes(encode_safetensors(model.state_dict(), model.config))
    return str(path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("crate_mae_a", "crate"),
        ("crate_classifier", "crate-classifier"),
        ("vit_mae_all_tokens", "mae"),
        ("vit_mae_facebook", "mae"),
    ],
)
def test_each_published_layout_is_recognised_by_its_keys(name: str, layout: str) -> None:
    config, state = golden(name)
    loaded = load_weights(create_model(config), state)
    assert loaded == LoadedWeights(layout, name != "crate_classifier", (), (), ())  # type: ignore[arg-type]


def test_an_encoder_alone_leaves_the_decoder_as_it_was_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    config, state = facebook_encoder()
    model, before = create_model(config), create_model(config)
    before.load_state_dict(model.state_dict())
    loaded = load_weights(model, {"model": state})
    assert not loaded.has_decoder
    assert set(loaded.untrained) == {k for k, _ in model.named_parameters() if k.startswith("decoder_") or k == "mask_token"}
    assert [record.message for record in caplog.records] == list(loaded.warnings)
    assert "the decoder keeps its initial values" in loaded.warnings[0]
    assert torch.equal(model.decoder_pred.weight, before.decoder_pred.weight)  # type: ignore[union-attr,arg-type]
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("left", ["mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.bias"])
def test_a_decoder_in_part_is_refused_with_what_is_missing(left: str) -> None:
    config, state = facebook_encoder()
    state[left] = golden("vit_mae_facebook")[1][left]
    with pytest.raises(ConfigError, match=r"missing: decoder_blocks\.0\.attn\.proj\.bias"):
        load_weights(create_model(config), state)


def test_a_fine_tuned_checkpoint_of_facebook_gives_its_logits() -> None:
    state, model = facebook_finetuned(), vit_classifier()
    loaded = load_weights(model, {"model": state})
    assert (loaded.layout, loaded.untrained, loaded.has_decoder) == ("mae-finetune", (), False)
    config, full = golden("vit_mae_facebook")
    encoder = create_model(config)
    load_weights(encoder, full)
    encoder.norm = torch.nn.Identity()  # the published fine-tuning norms the mean instead of the tokens
    images = torch.randn(2, 3, 32, 32)
    mean_BD = encoder.encode(images)[:, 1:].mean(1)
    normed_BD = torch.nn.functional.layer_norm(mean_BD, (48,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    torch.testing.assert_close(model(images), normed_BD @ state["head.weight"].t() + state["head.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_pretrained_encoder_goes_into_a_classifier_and_its_norm_only_where_the_class_token_is_read(pool: str) -> None:
    _, state = golden("vit_mae_facebook")
    model = vit_classifier(pool=pool)
    head = model.head.weight.clone()
    loaded = load_weights(model, state, part="encoder")
    own_norm = {"fc_norm.weight", "fc_norm.bias"} if pool == "mean" else set()
    assert set(loaded.untrained) == {"head.weight", "head.bias"} | own_norm
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.pos_embed, state["pos_embed"])
    assert torch.equal(model.blocks[0].attn.qkv.bias, state["blocks.0.attn.qkv.bias"])  # type: ignore[union-attr,arg-type]
    if pool == "cls":
        assert torch.equal(model.norm.weight, state["norm.weight"])


def test_a_crate_encoder_of_a_whole_autoencoder_goes_into_a_linear_classifier_and_not_into_the_published_one() -> None:
    config, state = golden("crate_mae_a")
    keys = {"encoder_tokens": "all", "decoder_width": 48, "num_classes": 5}
    linear = create_model(config, **keys, embedding="linear", pool="cls")
    assert set(load_weights(linear, state, part="encoder").untrained) == {"head.weight", "head.bias"}
    with pytest.raises(ConfigError, match=r"missing: embed_norm\.bias"):
        load_weights(create_model(config, **keys, embedding="normed", pool="cls"), state, part="encoder")


@pytest.mark.parametrize(
    ("name", "keys", "table"),
    [
        ("vit_mae_facebook", {"decoder_width": 48}, "pos_embed"),
        ("vit_mae_all_tokens", {}, "decoder_pos_embed"),
        ("crate_mae_a", {}, "decoder_pos_embed"),
    ],
)
def test_a_classifier_takes_the_position_table_that_the_files_encoder_read(name: str, keys: dict[str, Any], table: str) -> None:
    config, _ = golden(name)
    autoencoder = create_model(config, **keys)
    layout = "crate" if config.family == "crate" else "mae"
    state = dict(published_state(autoencoder, layout).state)
    state |= {key: torch.randn_like(state[key]) for key in ("pos_embed", "decoder_pos_embed")}
    assert state["pos_embed"].shape == state["decoder_pos_embed"].shape
    own = {"encoder_tokens": "all", "num_classes": 7, "embedding": "linear", "pool": "cls", "decoder_width": 48}
    model = create_model(config, **own)
    load_weights(model, state, part="encoder")
    assert torch.equal(model.pos_embed, state[table])


def test_a_missing_encoder_tensor_is_refused_for_the_encoder_too() -> None:
    _, state = golden("vit_mae_facebook")
    del state["blocks.1.norm2.bias"], state["decoder_norm.bias"]
    with pytest.raises(ConfigError) as caught:
        load_weights(vit_classifier(), state, part="encoder")
    assert "missing: blocks.1.norm2.bias" in str(caught.value)
    assert "decoder_norm" not in str(caught.value)


def bicubic(table: Tensor, side: int) -> Tensor:
    """An independent form: each channel as a picture, resized, the class row in front."""
    old = round((table.shape[1] - 1) ** 0.5)
    channels = [
        torch.nn.functional.interpolate(channel.reshape(1, 1, old, old), (side, side), mode="bicubic").flatten()
        for channel in table[0, 1:].t()
    ]
    return torch.cat([table[0, :1], torch.stack(channels, dim=1)])[None]


def test_fixed_tables_of_both_sides_are_interpolated_to_another_image_size() -> None:
    config, state = golden("vit_mae_facebook")
    model = create_model(config, image_size=48)
    loaded = load_weights(model, state)
    assert loaded.interpolated == ("pos_embed", "decoder_pos_embed")
    torch.testing.assert_close(model.pos_embed, bicubic(state["pos_embed"], 6))
    torch.testing.assert_close(model.decoder_pos_embed, bicubic(state["decoder_pos_embed"], 6))


def test_learned_tables_are_interpolated_too() -> None:
    config, state = golden("crate_classifier")
    model = create_model(config, image_size=64)
    assert load_weights(model, state).interpolated == ("pos_embed",)
    torch.testing.assert_close(model.pos_embed.data, bicubic(state["pos_embedding"], 8))


def test_the_table_of_the_same_size_comes_through_to_the_last_bit() -> None:
    config, state = golden("crate_classifier")
    model = create_model(config)
    load_weights(model, state)
    assert torch.equal(model.pos_embed.data, state["pos_embedding"])


def test_a_grid_that_is_no_square_is_refused() -> None:
    config, state = golden("crate_classifier")
    state["pos_embedding"] = state["pos_embedding"][:, :-1]
    with pytest.raises(ConfigError, match="pos_embed: a position table of 15 patches is no square grid"):
        load_weights(create_model(config), state)


def test_weights_of_all_tokens_enter_a_model_of_visible_tokens_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    model = build(encoder_tokens="visible")
    with pytest.raises(ConfigError, match="set convert=True"):
        load_weights(model, published())
    loaded = load_weights(model, published(), convert=True)
    assert len(caplog.records) == 1
    assert "decoder_embed is untrained" in caplog.records[0].message
    assert loaded.untrained == ("decoder_embed.weight", "decoder_embed.bias")
    for key in ("decoder_embed.weight", "pos_embed", "decoder_pos_embed"):
        assert torch.equal(model.state_dict()[key], published()[key])


def test_a_conversion_does_without_the_dead_tensors() -> None:
    state = {key: value for key, value in published().items() if not key.startswith("decoder_embed.")}
    model = build(encoder_tokens="visible")
    before = model.decoder_embed.weight.clone()
    assert load_weights(model, state, convert=True).untrained == ("decoder_embed.weight", "decoder_embed.bias")
    assert torch.equal(model.decoder_embed.weight, before)


def test_our_own_weights_of_all_tokens_convert_as_well(tmp_path: Path) -> None:
    source, target = build(1), build(2, encoder_tokens="visible")
    path = save_ours(tmp_path / "all.safetensors", source)
    with pytest.raises(ConfigError, match="set convert=True"):
        load_weights(target, path)
    load_weights(target, path, convert=True)
    assert torch.equal(target.decoder_pred.weight, source.decoder_pred.weight)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ista_lambda", 5.0),
        ("ista_step_size", [0.1, 0.2]),
        ("num_heads", 4),
        ("decoder_num_heads", 4),
        ("norm_pix_loss", True),
        ("block_norm_eps", 1e-6),
        ("final_norm_eps", 1e-5),
    ],
)
def test_a_file_of_ours_is_refused_by_a_model_that_would_compute_something_else(tmp_path: Path, key: str, value: Any) -> None:
    path = save_ours(tmp_path / "ours.safetensors", build(1, decoder_num_heads=3))
    model = build(2, **{"decoder_num_heads": 3, key: value})
    with pytest.raises(ConfigError, match=rf"belong to another configuration(.|\n)*{key}: "):
        load_weights(model, path)
    load_weights(model, safetensors.torch.load_file(path))  # the tensors alone are believed


def test_trained_scalars_do_not_become_constants_and_constants_may_be_trained_on(tmp_path: Path) -> None:
    trained = save_ours(tmp_path / "trained.safetensors", build(1, ista_learnable="layer"))
    with pytest.raises(ConfigError, match=r"ista_learnable: layer in the file, none in the model$"):
        load_weights(build(2), trained, part="encoder")
    source = build(1, ista_learnable="layer")  # in a published layout there is no place for them
    (tmp_path / "published.safetensors").write_bytes(encode_safetensors(published_state(source, "crate").state, source.config))
    with pytest.raises(ConfigError, match=r"missing: blocks\.0\.ista\.log_"):
        load_weights(build(2, ista_learnable="layer"), str(tmp_path / "published.safetensors"))
    constant = save_ours(tmp_path / "constant.safetensors", build(1))
    load_weights(build(2, ista_learnable="layer"), constant)
    with pytest.raises(ConfigError, match=r"ista_lambda: 0\.5 in the file, 0\.1 in the model$"):
        load_weights(build(2, ista_learnable="layer", ista_lambda=0.1), constant)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_last_norms_epsilon_counts_where_that_norm_is_taken(tmp_path: Path, pool: str) -> None:
    path = save_ours(tmp_path / "ours.safetensors", build(1))
    keys = {"num_classes": 5, "embedding": "linear", "pool": pool, "final_norm_eps": 1e-5}
    classifier = create_model(ModelConfig.parse({**SHAPE, **keys}))
    if pool == "mean":
        load_weights(classifier, path, part="encoder")
        return
    with pytest.raises(ConfigError, match="final_norm_eps: 1e-06 in the file, 1e-05 in the model"):
        load_weights(classifier, path, part="encoder")


def test_equal_weights_are_equal_files() -> None:
    model = build(1)
    assert len({encode_safetensors(model.state_dict(), model.config) for _ in range(8)}) == 1


def test_what_does_not_change_the_function_may_differ(tmp_path: Path) -> None:
    path = save_ours(tmp_path / "ours.safetensors", build(1))
    load_weights(build(2, mask_ratio=0.5, ista_lambda=[0.5, 0.5]), path)
    load_weights(build(2, norm_pix_loss=True), path, part="encoder")


def test_a_bad_configuration_in_the_metadata_is_an_error_of_one_message(tmp_path: Path) -> None:
    for content in ("nonsense", "[1]", '{"family": "crate", "widht": 3}'):
        path = tmp_path / "a.safetensors"
        safetensors.torch.save_file(build().state_dict(), path, metadata={"config": content})
        with pytest.raises(ConfigError, match=r"a\.safetensors"):
            load_weights(build(), str(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    state = published()
    state["blocks.1.layers.0.1.fn.weight"][3, 4] = value
    model, untouched = build(1), build(1)
    with pytest.raises(ConfigError, match=r"NaN or infinite.*blocks\.1\.ista\.dictionary"):
        load_weights(model, state)
    assert same(model, untouched)


def test_tensors_that_are_no_plain_numbers_are_refused_by_name() -> None:
    state = published() | {"norm.weight": torch.ones(48, dtype=torch.int8), "norm.bias": torch.zeros(48).to_sparse()}
    with pytest.raises(
        ConfigError, match=r"norm\.bias is a torch\.sparse_coo(.|\n)*norm\.weight is a torch\.strided torch\.int8"
    ):
        load_weights(build(), state)


def test_another_architecture_is_told_in_words_before_its_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load_weights(vit_classifier(), published())
    message = str(caught.value)
    assert "file:  CRATE layers: 2 encoder layers of width 48, 2 decoder layers of width 48, patches of 8 pixels" in message
    assert "model: transformer layers: 2 encoder layers of width 48, a head of 7 classes" in message


class _Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"model": published(), "bomb": _Bomb(tmp_path / "ran")}, tmp_path / "bomb.pth")
    with pytest.raises(ConfigError, match="hold Python objects"):
        load_weights(build(), str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "bomb.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_error(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(published(), path)
    else:
        safetensors.torch.save_file(published(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=f"whole{suffix}"):
        load_weights(build(), str(path))
