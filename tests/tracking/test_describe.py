"""Names, parameters and addresses: pure functions, no database."""

from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import PRESETS, ConfigError, ModelConfig, RunConfig
from crate_ray.runs.settings import dataset_name, model_name
from crate_ray.tracking import default_uri, view_url
from crate_ray.tracking.client import absolute_uri, hide_secrets, one_line, public_uri
from crate_ray.tracking.describe import MAX_NAME, params_of, run_name
from crate_ray.tracking.limits import valid_key


def config_of(model: dict[str, Any], **overrides: Any) -> RunConfig:
    sections = {"data": {"train": "d"}, "optimizer": {"lr": 1e-3}, "train": {"steps": 1, "global_batch": 8}}
    return RunConfig.parse({"model": model, **sections, **overrides})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"preset": "crate_mae_tiny"}, "12x384 s0 crate"),
        ({"preset": "mae_base"}, "12x768 s0 vit"),
        ({"preset": "crate_mae_tiny", "ista_step_size": 0.2}, "12x384 e0.2 s0 cra"),
        ({"preset": "mae_small", "mask_ratio": 0.6}, "12x384 m0.6 s0 vit"),
        ({"preset": "crate_mae_base", "attention": "untied", "feedforward": "mlp"}, "12x768 qkv mlp s0 "),
        ({"preset": "mae_base", "share_layers": True}, "12x768 1L s0 vit"),
    ],
)
def test_a_run_name_says_first_what_tells_runs_apart(model: dict[str, Any], expected: str) -> None:
    name = run_name("folder", config_of(model))
    assert name == expected
    assert len(name) <= MAX_NAME


def test_an_ablation_is_told_from_its_family_and_has_the_parameters_of_its_own_layers() -> None:
    params = params_of(config_of({"preset": "crate_mae_base", "feedforward": "mlp", "mlp_ratio": 0.5}))
    assert (params["arch"], params["ista_step_size"]) == ("crate_mae mlp r0.5 12x768", "none")
    params = params_of(config_of({"preset": "mae_base", "feedforward": "ista"}))
    assert (params["arch"], params["ista_step_size"]) == ("mae ista 12x768", "0.1")


def test_a_name_that_the_user_chose_stands() -> None:
    assert run_name("my-first-run", config_of({"preset": "mae_small"}, name="my-first-run")) == "my-first-run"


def test_every_preset_of_a_masked_autoencoder_has_its_model_name_without_a_size() -> None:
    for preset, values in PRESETS.items():
        if "num_classes" not in values:
            assert preset.startswith(model_name(ModelConfig.parse({"preset": preset})) + "_")


@pytest.mark.parametrize(
    ("uri", "name"), [("out/digits/train", "digits"), ("s3://b/imagenet/train/", "imagenet"), ("shapes", "shapes")]
)
def test_a_data_set_is_named_by_its_folder(uri: str, name: str) -> None:
    assert dataset_name(uri) == name


def test_keys_that_mlflow_refuses_are_made_acceptable() -> None:
    assert valid_key("whitebox/layer03/coding_rate_pre_nats") == "whitebox/layer03/coding_rate_pre_nats"
    assert valid_key("a=b@(c)") == "a_b__c_"
    assert len(valid_key("k" * 400)) == 250


def test_a_database_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_uri("out") == f"sqlite:///{tmp_path}/out/mlflow.db"
    assert default_uri("s3://bucket/runs") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute_uri("http://host:5000/") == "http://host:5000"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "sqlite:///", "http:host"])
def test_what_is_no_tracking_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"):
        absolute_uri(uri)


def test_a_password_is_not_shown() -> None:
    assert public_uri("postgresql://me:secret@host:5432/db") == "postgresql://host:5432/db"
    assert public_uri("sqlite:////data/a@b/mlflow.db") == "sqlite:////data/a@b/mlflow.db"
    assert public_uri("http://host:5000/a@b") == "http://host:5000/a@b"
    for password in ("pa/ss", "pa#ss", "pa?ss"):  # as SQLAlchemy takes them
        assert public_uri(f"postgresql://me:{password}@host/db") == "postgresql://host/db"
        assert one_line(OSError(f"no postgresql://me:{password}@host/db here")) == "no postgresql://host/db here"
    assert public_uri("postgresql://host/db?user=me&password=secret") == "postgresql://host/db"
    with pytest.raises(ConfigError, match="postgres://host/db") as refused:
        absolute_uri("postgres://me:secret@host/db")
    assert "secret" not in str(refused.value)


def test_a_password_in_a_command_is_not_mirrored_and_a_container_is_no_password() -> None:
    command = (
        "crate-ray train tiny --set tracking.uri=postgresql://me:secret@host/db --set storage.path=abfs://runs@account/out"
    )
    assert hide_secrets(command) == command.replace("me:secret@", "")


def test_a_link_to_a_view_needs_no_click() -> None:
    assert view_url("http://host:1/", "7", "v") == (
        "http://host:1/#/experiments/7/runs?viewStateShareKey=v&compareRunsMode=CHART&workflowType=machine_learning"
    )


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),
    [
        ([], "crate", "4x128 cls s0 crate"),
        (["model.embedding=linear", "model.pool=mean"], "crate_linear", "4x128 cls s0 crate"),
        (["model.family=vit", "model.embedding=linear"], "vit_linear", "4x128 cls s0 vit"),
    ],
)
def test_a_classifier_is_told_from_the_autoencoders(overrides: list[str], name: str, expected: str) -> None:
    config = RunConfig.load("digits_crate_classify", overrides)
    params = params_of(config)
    assert (params["model"], params["mask_ratio"]) == (name, "none")
    assert run_name("folder", config) == expected
