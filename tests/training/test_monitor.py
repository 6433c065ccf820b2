"""What a run records of itself: waits, memory, utilisation, norms of blocks, checkpoints, and traces of its steps."""

import gzip
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes

from crate_ray.config import ConfigError, RunConfig
from crate_ray.models import create_model
from crate_ray.models.cost import count_parameters, training_flops_per_image
from crate_ray.models.peaks import peak_tflops
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.norms import BlockNorms, block_of
from crate_ray.training.profiling import MOST_STEPS, ProfiledSteps

LoadTiny = Callable[..., RunConfig]
TIMEOUT_S = 150


def trained(config: RunConfig, folder: Path, **options: object) -> dict[int, dict[str, float]]:
    """A run of one worker; its values by step."""
    run_training(config, RunFolder(str(folder)), LocalContext(), **options)  # type: ignore[arg-type]
    return {record.step: dict(record.values) for record in read_records(RunFolder(str(folder)))}


@pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae", "digits_crate_classify"])
def test_the_blocks_gradients_make_up_the_whole_gradient_and_every_parameter_has_a_block(
    recipe: str, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    more = ["model.encoder_depth=2", "train.steps=4", "train.clip_norm=0.01", "eval.norms_every_steps=2"]
    shards = [] if recipe != "digits_crate_classify" else ["model.num_classes=10"]
    values = trained(load_tiny(*more, *shards, recipe=recipe), tmp_path / "run")
    for step in (2, 4):
        norms = {key: value for key, value in values[step].items() if key.startswith("norms/")}
        grads = {key.split("/")[1]: value for key, value in norms.items() if key.endswith("/grad")}
        # The clip at 0.01 is far below: what is recorded is the norm before it.
        assert math.hypot(*grads.values()) == pytest.approx(values[step]["train/grad_norm"], rel=1e-5)
        assert {"embedding", "layer01", "layer02", "rest"} <= grads.keys()
        assert ("decoder01" in grads) == (recipe != "digits_crate_classify")
    assert not any(key.startswith("norms/") for step in (1, 3) for key in values[step])


def test_an_update_ratio_is_the_change_of_a_block_over_its_weights() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"patch_embed": nn.Linear(4, 3), "blocks": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = BlockNorms(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()  # not armed: nothing is measured
    assert norms.take(1, grad_norm=1.0) == {}
    norms.arm(2)
    middle = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    whole = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    found = norms.take(2, grad_norm=10 * whole)  # as if the optimizer had seen it clipped to a tenth
    assert before.keys() == middle.keys()
    for block, part in (("embedding", "patch_embed."), ("layer01", "blocks.0."), ("layer02", "blocks.1.")):
        mine = [(p, middle[name]) for name, p in model.named_parameters() if name.startswith(part)]
        grad = math.sqrt(sum(float(p.grad.square().sum()) for p, _ in mine if p.grad is not None))
        weight = math.sqrt(sum(float(old.square().sum()) for _, old in mine))
        assert found[f"norms/{block}/grad"] == pytest.approx(10 * grad, rel=1e-5)
        assert found[f"norms/{block}/update_ratio"] == pytest.approx(0.5 * grad / weight, rel=1e-5)
    assert norms.take(2, grad_norm=1.0) == {}


def test_a_block_that_is_not_finite_does_not_hide_the_others() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = BlockNorms(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model["blocks"][1].weight.grad[0, 0] = math.nan  # type: ignore[index]
    norms.arm(7)
    optimizer.step()
    found = norms.take(7, grad_norm=math.nan)
    assert found["norms/layer01/grad"] == pytest.approx(math.sqrt(6))
    assert math.isnan(found["norms/layer02/grad"])


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.11.attn.qkv.weight", "layer12"),
        ("decoder_blocks.0.norm.bias", "decoder01"),
        ("patch_embed.weight", "embedding"),
        ("cls_token", "embedding"),
        ("decoder_embed.weight", "rest"),
        ("mask_token", "rest"),
        ("head.bias", "rest"),
    ],
)
def test_a_parameter_lies_in_one_block(name: str, block: str) -> None:
    assert block_of(name) == block


def in_processes(world_size: int, work: Callable[..., None], *arguments: object) -> None:
    """Runs `work(rank, *arguments)` in so many processes, and ends them, whatever happens, after TIMEOUT_S."""
    context = start_processes(work, arguments, nprocs=world_size, join=False, start_method="spawn")  # type: ignore[no-untyped-call]
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1, grace_period=5):
            assert time.monotonic() < deadline, f"workers did not end within {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()


def train_shared(rank: int, world_size: int, config: dict[str, Any], out: str) -> None:
    """Trains the same run with copies of the model, then with shards of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world_size)
    for parallel in ("ddp", "fsdp"):
        context = LocalContext()
        context.rank, context.world_size, context.local_rank = rank, world_size, rank
        parsed = RunConfig.parse({**config, "scale": {**config["scale"], "parallel": parallel}})
        run_training(parsed, RunFolder(f"{out}/{parallel}"), context, profiled=ProfiledSteps(2, 2))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_workers_record_the_norms_of_one_with_copies_or_shards_of_the_model(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("train.steps=4", "eval.norms_every_steps=2", "train.clip_norm=0.1")
    alone = trained(config, tmp_path / "alone")
    in_processes(2, train_shared, 2, config.model_dump(mode="json"), str(tmp_path))
    keys = [key for key in alone[4] if key.startswith("norms/")]
    assert len(keys) == 8
    for parallel in ("ddp", "fsdp"):
        shared = {record.step: record.values for record in read_records(RunFolder(str(tmp_path / parallel)))}
        for step in (2, 4):
            assert {key: shared[step][key] for key in keys} == pytest.approx({key: alone[step][key] for key in keys}, rel=1e-3)
        assert shared[4]["perf/num_workers"] == 2
        assert (tmp_path / parallel / "profile" / "steps_2-2.json.gz").exists()


def measure_sharded(rank: int, world_size: int, hybrid: bool, folder: str) -> None:
    """Norms of a sharded model after one step of known gradients; each rank writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    model, grads = sharding_case()
    shape, names = ((2, world_size // 2), ("copy", "shard")) if hybrid else ((world_size,), ("shard",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = BlockNorms(model, optimizer)
    for name, parameter in model.named_parameters():
        parameter.grad = dist.tensor.distribute_tensor(grads[name], parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    norms.arm(1)
    optimizer.step()
    Path(folder, f"{rank}.json").write_text(json.dumps(norms.take(1, grad_norm=3.0)))
    dist.destroy_process_group()


class Stack(nn.Module):
    """Two blocks whose rows no number of workers here divides."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(6, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 7)])

    def forward(self, z_BD: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](self.patch_embed(z_BD)))  # type: ignore[no-any-return]


def sharding_case() -> tuple[Stack, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Stack()
    return model, {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "hybrid"), [(2, False), (4, True)])
def test_norms_of_sharded_parameters_are_those_of_whole_ones(world_size: int, hybrid: bool, tmp_path: Path) -> None:
    model, grads = sharding_case()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = BlockNorms(model, optimizer)
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name]
    norms.arm(1)
    optimizer.step()
    expected = norms.take(1, grad_norm=3.0)
    in_processes(world_size, measure_sharded, world_size, hybrid, str(tmp_path))
    for rank in range(world_size):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-5)


def test_a_window_records_waits_memory_workers_and_the_share_of_the_peak(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("train.steps=6", "eval.log_every_steps=3", "checkpoint.every_steps=2", "scale.peak_tflops=0.5")
    values = trained(config, tmp_path / "run")
    window = values[6]
    assert 0 < window["perf/checkpoint_wait_fraction"] < 1
    assert 0 <= window["perf/eval_wait_fraction"] < 1
    assert window["perf/num_workers"] == 1
    assert 0 < window["memory/host_rss_gib"] <= window["memory/peak_gib"] * 1.01
    flops_per_s = window["perf/images_per_s"] * training_flops_per_image(config.model)
    assert window["perf/mfu"] == pytest.approx(flops_per_s / 0.5e12, rel=1e-6)
    assert [step for step in sorted(values) if "checkpoint/step" in values[step]] == [2, 4, 6]
    assert all(values[step]["checkpoint/step"] == step for step in (2, 4, 6))


def test_the_peak_of_a_cpu_is_not_guessed(load_tiny: LoadTiny, tmp_path: Path) -> None:
    values = trained(load_tiny("train.steps=2"), tmp_path / "run")
    assert not any("perf/mfu" in found for found in values.values())


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", None),  # another card, not an L4
        ("AMD EPYC 9R14", None),
    ],
)
def test_a_device_is_known_by_whole_words_of_its_name(name: str, tflops: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == tflops


def test_norms_change_no_number_of_the_run(load_tiny: LoadTiny, tmp_path: Path) -> None:
    with_norms = trained(load_tiny("eval.norms_every_steps=1"), tmp_path / "with")
    without = trained(load_tiny("eval.norms_every_steps=null"), tmp_path / "without")
    assert [with_norms[step]["train/loss"] for step in sorted(with_norms)] == [
        without[step]["train/loss"] for step in sorted(without)
    ]


def test_a_trace_of_steps_two_to_three_is_written_beside_the_run_with_its_table(load_tiny: LoadTiny, tmp_path: Path) -> None:
    trained(load_tiny("train.steps=5"), tmp_path / "run", profiled=ProfiledSteps.parse("2:3"))
    trace = json.loads(gzip.decompress((tmp_path / "run" / "profile" / "steps_2-3.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = sum("Optimizer.step" in name for name in names)
    assert steps == 2
    assert "aten::" in (tmp_path / "run" / "profile" / "steps_2-3.txt").read_text()


def test_a_run_that_stops_within_the_range_keeps_what_was_traced(load_tiny: LoadTiny, tmp_path: Path) -> None:
    class StopAtThree(LocalContext):
        def heartbeat(self, step: int) -> None:
            if step == 3:
                self.stop()

    config, folder = load_tiny("train.steps=9"), RunFolder(str(tmp_path / "run"))
    run_training(config, folder, StopAtThree(), profiled=ProfiledSteps(2, 8))
    assert [path.name for path in sorted((tmp_path / "run" / "profile").iterdir())] == ["steps_2-4.json.gz", "steps_2-4.txt"]


def test_a_trace_that_cannot_be_written_costs_no_step(
    load_tiny: LoadTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    values = trained(load_tiny("train.steps=4"), tmp_path / "run", profiled=ProfiledSteps(2, 2))
    assert "train/loss" in values[4]
    assert any("the profile is lost" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20", "is no range of steps"),
        ("a:b", "is no range of steps"),
        ("0:4", "counted from 1"),
        ("9:3", "is no range of steps"),
        (f"5:{5 + MOST_STEPS}", f"at most {MOST_STEPS}, as in 5:9"),
    ],
)
def test_a_bad_range_is_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProfiledSteps.parse(text)


@pytest.mark.parametrize(
    ("done", "total", "message"),
    [(10, 100, "within 11:100"), (0, 11, "within 1:11"), (100, 100, "has taken all of its 100 steps")],
)
def test_steps_that_the_run_will_not_take_are_refused(done: int, total: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ProfiledSteps.parse("10:12").check(done=done, total=total)


def test_every_trainable_parameter_is_measured_once(load_tiny: LoadTiny) -> None:
    config = load_tiny()
    model = create_model(config.model)
    norms = BlockNorms(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sum(p.numel() for block in norms._blocks.values() for p in block) == count_parameters(config.model).trainable
