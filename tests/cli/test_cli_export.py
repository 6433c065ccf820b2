import json
from pathlib import Path

import pytest
import torch
from saved_checkpoints import save_checkpoint

from crate_ray.models import create_model, load_weights


@pytest.fixture
def trained(make_run):
    """A run folder with a checkpoint of random weights, and the model that has them."""
    folder = make_run("a")
    torch.manual_seed(0)
    model = create_model(folder.read_config().model)
    save_checkpoint(folder, step=20, cursor=0, train_seconds=1.0, model=model.state_dict(), optimizer={})
    return folder, model


@pytest.mark.parametrize("out", ["a.safetensors", "b.pth", "c.safetensors"])
def test_weights_come_back_from_every_format_of_tensors(invoke, trained, tmp_path, out):
    folder, model = trained
    format = "safetensors" if out.startswith("a") else "crate"
    report = json.loads(invoke("export", folder.uri, tmp_path / out, "--format", format, "--json").out)
    path = Path(report["out"])
    assert (report["run"], report["step"], report["bytes"]) == ("a", 20, path.stat().st_size)
    again = create_model(model.config)
    load_weights(again, str(path))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_text_names_the_file_and_what_nobody_reads(invoke, trained, tmp_path):
    result = invoke("export", trained[0].uri, tmp_path / "b.pth", "--format", "crate")
    assert result.code == 0
    assert str(tmp_path / "b.pth") in result.out
    assert "layout crate" in result.out
    assert "whose forward pass never reads it" in result.out


def test_another_image_size_interpolates_positions(invoke, trained, tmp_path):
    folder, model = trained
    out, side = tmp_path / "a.safetensors", 2 * model.config.image_size
    result = invoke("export", folder.uri, out, "--format", "safetensors", "--image-size", side)
    assert f"pos_embed was interpolated for images of {side} pixels" in result.out
    larger = create_model(model.config, image_size=side)
    assert load_weights(larger, str(out)).interpolated == ()


@pytest.mark.parametrize(
    ("out", "arguments", "says"),
    [
        ("a.pth", ["--format", "mae"], "--format mae cannot hold this model (family = crate)"),
        ("a.bin", ["--format", "crate"], "writes .pth or .safetensors"),
        ("a.onnx", ["--format", "onx"], "--format onx is unknown; valid: safetensors"),
        ("a.safetensors", ["--format", "safetensors", "--image-size", "33"], "not a multiple of patch_size"),
    ],
)
def test_what_cannot_be_written_is_one_error(invoke, trained, tmp_path, out, arguments, says):
    result = invoke("export", trained[0].uri, tmp_path / out, *arguments)
    assert result.code == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / out).exists()


def test_a_file_that_exists_is_kept_unless_forced(invoke, trained, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("mine")
    refused = invoke("export", trained[0].uri, out, "--format", "safetensors")
    assert (refused.code, out.read_text()) == (2, "mine")
    assert "--force" in refused.err
    assert invoke("export", trained[0].uri, out, "--format", "safetensors", "--force").code == 0


@pytest.mark.parametrize(("out", "says"), [("folder.pth", "is a folder; name a file"), ("file/a.pth", "cannot be written")])
def test_a_place_that_cannot_be_written_is_one_error_before_the_work(invoke, trained, tmp_path, out, says):
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").write_text("")
    result = invoke("export", trained[0].uri, tmp_path / out, "--format", "crate", "--force")
    assert result.code == 2
    assert says in result.err
    assert not list((tmp_path / "folder.pth").iterdir())


def test_nothing_but_the_file_is_left(invoke, trained, tmp_path):
    assert invoke("export", trained[0].uri, tmp_path / "new" / "a.pth", "--format", "crate").code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pth"]


def test_a_folder_without_a_run_or_without_a_checkpoint_is_refused(invoke, make_run, tmp_path):
    arguments = (tmp_path / "a.safetensors", "--format", "safetensors")
    assert "is not a run folder" in invoke("export", tmp_path / "nothing", *arguments).err
    assert "has no checkpoint yet" in invoke("export", make_run("b").uri, *arguments).err


def test_the_metadata_holds_the_whole_configuration(invoke, trained, tmp_path):
    from safetensors import safe_open

    folder, model = trained
    invoke("export", folder.uri, tmp_path / "a.safetensors", "--format", "safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == model.config.model_dump(mode="json")


@pytest.mark.slow
def test_a_registered_checkpoint_has_a_version_and_an_alias_and_again_no_second_one(invoke, trained, tmp_path):
    from crate_ray.runs import Lease

    folder, _ = trained
    Lease.take(folder).end("FINISHED")
    arguments = ["export", folder.uri, tmp_path / "a.safetensors", "--format", "safetensors", "--force"]
    arguments += ["--register", "digits", "--alias", "best", "--uri", f"sqlite:///{tmp_path}/mlflow.db", "--json"]
    first, again = (json.loads(invoke(*arguments).out)["registered"] for _ in range(2))
    assert (first["name"], first["version"], first["alias"], first["is_new"]) == ("digits", 1, "best", True)
    assert again == {**first, "is_new": False}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--alias", "best"], "add --register NAME"),
        (["--register", "a/b"], "is no name of a registered model"),
        (["--register", "a", "--alias", "latest"], "is no alias"),
        (["--register", "a", "--uri", "http://127.0.0.1:9"], "does not answer; start it, or leave --register out"),
    ],
)
def test_a_registration_that_cannot_be_is_refused_before_a_file_is_written(invoke, trained, tmp_path, arguments, says):
    out = tmp_path / "a.safetensors"
    result = invoke("export", trained[0].uri, out, "--format", "safetensors", *arguments)
    assert result.code == 2
    assert says in result.err
    assert not out.exists()
