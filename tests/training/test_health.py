"""Steps without a finite loss: skipped, rolled back from, and named by layer; the path repeats after a crash."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import torch
from bad_batches import without_numbers
from ranks import Group, values
from saved_checkpoints import save_checkpoint
from torch import Tensor, nn

from crate_ray.config import RunConfig
from crate_ray.data import BatchReader
from crate_ray.runs import RunFolder, read_interventions
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint, list_checkpoints
from crate_ray.training.health import Spikes, TrainingDivergedError
from crate_ray.training.loop import LocalContext, LoopResult, run_training
from crate_ray.training.nonfinite import find_non_finite

LoadTiny = Callable[..., RunConfig]
BATCH = 8
# Steps 6, 7 and 8 read these.
BAD = {5 * BATCH, 6 * BATCH, 7 * BATCH}
ROLLING_BACK = (
    "health.max_skipped=3",
    "health.lr_factor=0.5",
    "health.lr_steps=3",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=9",
    "eval.every_steps=5",
    "train.steps=10",
    "train.ema=0.9",
    "data.num_loaders=0",
)


@dataclass
class DyingContext(LocalContext):
    """Dies when a step is done for the n-th time."""

    attempt: int
    step: int
    time: int

    def __post_init__(self) -> None:
        super().__init__(self.attempt)

    def heartbeat(self, step: int) -> None:
        if step == self.step:
            self.time -= 1
            if self.time == 0:
                raise KeyboardInterrupt


def tensors(folder: RunFolder, step: int | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, the newest by default: model, optimizer and, where there is one, average."""
    checkpoint = next(c for c in reversed(list_checkpoints(folder)) if step in (None, c.step))
    return {f"{file}/{name}": tensor for file in checkpoint.files for name, tensor in checkpoint.read(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_bad_batch_leaves_weights_and_moments_as_they_are_and_is_counted(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("checkpoint.every_steps=1", "checkpoint.keep_last=99", "train.steps=8", "train.ema=0.9")
    assert run_training(config, folder, LocalContext(), open_batches=without_numbers({4 * BATCH})) == LoopResult("FINISHED", 8)
    assert 5 not in [c.step for c in list_checkpoints(folder)], "weights wait for a step that shows that they give numbers"
    steps = values(folder, "train/skipped_steps")
    assert steps == {step: float(step >= 5) for step in range(1, 9)}
    assert values(folder, "train/loss").keys() == {1, 2, 3, 4, 6, 7, 8}
    assert read_interventions(folder) == ()

    # The same run up to step 5, and stopped there: its weights are those of step 4, and the step counts.
    stopped = RunFolder(str(tmp_path / "stopped"))
    run_training(
        load_tiny("checkpoint.every_steps=4", "train.steps=8", "checkpoint.keep_last=99", "train.ema=0.9"),
        stopped,
        StoppedAt(5),
        open_batches=without_numbers({4 * BATCH}),
    )
    assert [c.step for c in list_checkpoints(stopped)] == [4, 5]
    assert_equal(tensors(stopped, 4), tensors(stopped, 5))
    assert latest_checkpoint(stopped).cursor == 5 * BATCH  # type: ignore[union-attr]
    run_training(
        load_tiny("train.steps=8", "train.ema=0.9"), stopped, LocalContext(2), open_batches=without_numbers({4 * BATCH})
    )
    assert_equal(tensors(stopped), tensors(folder))


class StoppedAt(LocalContext):
    """Asked to stop so that the given step is the last."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def heartbeat(self, step: int) -> None:
        if step == self._step - 1:
            self.stop()


def test_a_row_of_bad_batches_is_passed_over_from_the_checkpoint_before_it_at_a_lower_rate(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    folder, calm = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "calm"))
    run_training(load_tiny(*ROLLING_BACK), calm, LocalContext())
    assert run_training(load_tiny(*ROLLING_BACK), folder, LocalContext(), open_batches=without_numbers(BAD)) == LoopResult(
        "FINISHED", 10
    )
    (intervention,) = read_interventions(folder)
    assert (intervention.from_step, intervention.first_step, intervention.last_step) == (4, 6, 8)
    assert (intervention.pass_over, intervention.skipped_steps) == ((5 * BATCH, 8 * BATCH), 3)
    assert "`normalise`" in intervention.finding
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert newest.state["health"]["interventions"] == [intervention.as_dict()]

    lr, undisturbed = values(folder, "train/lr"), values(calm, "train/lr")
    assert lr == {step: rate * (0.5 if 5 <= step <= 7 else 1) for step, rate in undisturbed.items()}
    losses, expected = values(folder, "train/loss"), values(calm, "train/loss")
    assert [losses[step] for step in range(1, 6)] == [expected[step] for step in range(1, 6)]
    assert losses[6] != expected[6]
    assert values(folder, "data/epoch")[6] == 9 * BATCH / 48, "step 6 reads the batch after the bad ones"
    assert values(folder, "train/skipped_steps")[10] == 3
    finals = [(run.read_json("final.json") or {})["values"] for run in (folder, calm)]
    keys = ("final/rollbacks", "final/skipped_steps")
    assert [[final.get(key) for key in keys] for final in finals] == [[1, 3], [None, None]], "what comparisons flag it by"


@pytest.mark.parametrize(("step", "time"), [(5, 2), (8, 1)])
def test_a_crash_after_a_rollback_repeats_the_same_path_bit_by_bit(
    step: int, time: int, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    """Died one step after the rollback, before any new checkpoint, and some steps later."""
    whole, parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    config, bad = load_tiny(*ROLLING_BACK), without_numbers(BAD)
    run_training(config, whole, LocalContext(), open_batches=bad)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, parts, DyingContext(1, step, time), open_batches=bad)
    changed = load_tiny(*ROLLING_BACK, "health.lr_factor=0.1", "health.lr_steps=9")  # what was done once stays as it was
    run_training(changed, parts, LocalContext(2), open_batches=bad)
    for key in ("train/loss", "train/grad_norm", "train/lr", "data/epoch", "train/skipped_steps", "eval/loss"):
        assert values(parts, key) == values(whole, key), key
    assert_equal(tensors(parts), tensors(whole))
    assert [i.pass_over for i in read_interventions(parts)] == [i.pass_over for i in read_interventions(whole)]


def test_without_a_checkpoint_the_run_begins_again_with_its_first_weights(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder, calm = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "calm"))
    config = load_tiny("health.max_skipped=2", "health.lr_factor=1", "train.steps=6")
    run_training(config, calm, LocalContext())
    run_training(config, folder, LocalContext(), open_batches=without_numbers({2 * BATCH, 3 * BATCH}))
    (intervention,) = read_interventions(folder)
    assert (intervention.from_step, intervention.first_step) == (0, 3)
    losses, expected = values(folder, "train/loss"), values(calm, "train/loss")
    assert [losses[1], losses[2]] == [expected[1], expected[2]]
    assert losses.keys() == set(range(1, 7))


def test_a_checkpoint_that_leads_nowhere_is_left_for_the_one_before_it(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """Weights of step 4 that give no numbers: the first rollback goes there, the second behind it."""
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("checkpoint.every_steps=2", "checkpoint.keep_last=9", "health.max_skipped=2", "train.steps=8")
    run_training(config, folder, StoppedAt(4))
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    weights, optimizer = checkpoint.read(MODEL_FILE), checkpoint.read(OPTIMIZER_FILE)
    weights["blocks.0.attn.qkv.weight"] = torch.full_like(weights["blocks.0.attn.qkv.weight"], float("inf"))
    save_checkpoint(
        folder, step=4, cursor=4 * BATCH, train_seconds=1.0, model=weights, optimizer=optimizer, config=config.model
    )
    run_training(config, folder, LocalContext(2))
    first, second = read_interventions(folder)
    assert (first.from_step, second.from_step) == (4, 2)
    assert first.finding == "weights of `blocks.0.attn.qkv.weight` hold NaN or infinity"
    assert [c.step for c in list_checkpoints(folder)] == [2, 4, 6, 8]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(folder, 4).values()), "written anew on the new path"


def test_a_fault_that_stays_leaves_the_oldest_checkpoint(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """Whatever is read, no step is finite any more: rollbacks end, and what they go back to is still there."""
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("checkpoint.every_steps=2", "checkpoint.keep_last=2", "health.max_skipped=2", "train.steps=20")
    run_training(config, folder, StoppedAt(8))
    assert [c.step for c in list_checkpoints(folder)] == [6, 8]
    with pytest.raises(TrainingDivergedError):
        run_training(config, folder, LocalContext(2), open_batches=without_numbers(range(40 * BATCH)))
    assert [item.from_step for item in read_interventions(folder)] == [8, 6, 6]
    assert [c.step for c in list_checkpoints(folder)] == [6]


def test_a_checkpoint_that_a_rollback_went_behind_is_never_resumed_from(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """The process dies between writing the intervention down and going back: interventions.json alone knows."""
    folder, whole = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "whole"))
    config, bad = load_tiny(*ROLLING_BACK), without_numbers(BAD)
    run_training(config, whole, LocalContext(), open_batches=bad)
    run_training(config, folder, StoppedAt(7), open_batches=bad)
    assert latest_checkpoint(folder).step == 7  # type: ignore[union-attr]
    Path(folder.path("interventions.json")).write_text(Path(whole.path("interventions.json")).read_text())
    run_training(config, folder, LocalContext(2), open_batches=bad)
    assert values(folder, "train/loss") == values(whole, "train/loss")
    assert_equal(tensors(folder), tensors(whole))


def test_when_rollbacks_do_not_help_the_run_stops_and_says_which_layer(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("health.max_skipped=2", "health.max_rollbacks=1", "checkpoint.every_steps=1")
    with pytest.raises(
        TrainingDivergedError,
        match=r"loss nan and gradient norm nan at step 4; the input of `normalise` is not finite.*2 step\(s\) in a row.*"
        r"after 1 rollback\(s\) of at most 1 \(health\.max_rollbacks\)",
    ):
        run_training(config, folder, LocalContext(), open_batches=without_numbers(range(3 * BATCH, 99 * BATCH, BATCH)))
    assert len(read_interventions(folder)) == 1
    assert all(torch.isfinite(tensor).all() for tensor in tensors(folder).values())


def test_a_run_does_not_end_on_weights_that_gave_no_number_in_its_last_step(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("train.steps=6", "checkpoint.every_steps=2")
    run_training(config, folder, LocalContext(), open_batches=without_numbers({5 * BATCH}))
    (intervention,) = read_interventions(folder)
    assert (intervention.from_step, intervention.last_step) == (4, 6)
    assert values(folder, "train/loss").keys() == set(range(1, 7))


def test_a_validation_loss_that_is_no_number_between_skipped_steps_ends_the_wait(load_tiny: LoadTiny, tmp_path: Path) -> None:
    """Weights that overflow: five more batches would say nothing that the evaluation has not said."""
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny(
        "optimizer.lr=1e30", "schedule.warmup_steps=0", "train.clip_norm=null", "eval.every_steps=3", "health.max_rollbacks=0"
    )
    with pytest.raises(TrainingDivergedError, match=r"at step 2; .* 2 step\(s\) in a row"):
        run_training(config, folder, LocalContext())


def bad_on_rank_1(source: object, **named: object) -> BatchReader:
    """At module level, so that a new process finds it."""
    return without_numbers(BAD, on_rank=1)(source, **named)


def die_after_the_rollback(rank: int, step: int) -> None:
    """The first time that step 8 is over it was no skipped one."""
    if (rank, step) == (1, 8):
        os._exit(9)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_roll_back_alike_and_repeat_it_after_a_crash(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny(*ROLLING_BACK, "scale.num_workers=2")
    alone, whole, parts = (RunFolder(str(tmp_path / name)) for name in ("alone", "whole", "parts"))
    run_training(config, alone, LocalContext(), open_batches=without_numbers(BAD))
    assert Group(config, whole.uri, open_batches=bad_on_rank_1).run() == [0, 0]
    (ours,), (theirs,) = read_interventions(whole), read_interventions(alone)
    assert ours.finding == f"{theirs.finding} (rank 1)"
    assert (ours.from_step, ours.pass_over) == (theirs.from_step, theirs.pass_over)
    # float32: the same sums in another order, through ten updates of AdamW.
    assert values(whole, "train/loss") == pytest.approx(values(alone, "train/loss"), rel=1e-5)

    assert Group(config, parts.uri, at_step=die_after_the_rollback, open_batches=bad_on_rank_1).run()[1] == 9
    assert Group(config, parts.uri, attempt=2, open_batches=bad_on_rank_1).run() == [0, 0]
    assert values(parts, "train/loss") == values(whole, "train/loss")
    assert_equal(tensors(parts), tensors(whole))


class Reciprocal(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return 1 / x_BD


class Root(nn.Module):
    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD.sqrt()


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), middle, nn.Linear(3, 1))


def located(module: nn.Module, x_BD: Tensor, factor: float = 1.0) -> str | None:
    finding = find_non_finite(module, lambda: (module(x_BD).float() * factor).sum().backward())
    return None if finding is None else finding.text


def test_the_layer_that_first_gives_no_number_is_named_with_what_of_it() -> None:
    x_BD = torch.ones(2, 3)
    healthy = network(nn.Tanh())
    assert located(healthy, x_BD) is None
    assert located(healthy, torch.full((2, 3), float("nan"))) == "the input of `0` is not finite in the forward pass"

    with torch.no_grad():
        broken = network(nn.Tanh())
        broken[2].bias.fill_(float("inf"))
    assert located(broken, x_BD) == "weights of `2.bias` hold NaN or infinity"

    zero = network(Reciprocal())
    nn.init.zeros_(zero[0].weight)
    nn.init.zeros_(zero[0].bias)
    assert located(zero, x_BD) == "the output of `1` is not finite, though its input is"

    flat = network(Root())
    nn.init.zeros_(flat[0].weight)
    nn.init.zeros_(flat[0].bias)
    assert located(flat, x_BD) == "the gradient that leaves `1` is not finite, though the one that reaches it is"

    large = network(nn.Tanh())
    (large(x_BD).sum() * 1e30).backward()
    norms = {name: float(p.grad.double().norm()) for name, p in large.named_parameters() if p.grad is not None}
    large.zero_grad()
    assert located(large, x_BD, 1e30) == (
        f"the norm of the gradient overflows, by that of `{max(norms, key=norms.__getitem__)}`, though every entry is finite"
    )


def test_nothing_of_the_search_stays_on_the_model() -> None:
    model = network(nn.Tanh())
    located(model, torch.ones(2, 3))
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_a_spike_is_a_loss_far_above_the_median_of_those_before() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (1 + 0.01 * torch.randn(300, generator=generator)).tolist()
    losses[200] = 2.0
    spikes, found = Spikes(6.0), {}
    for number, loss in enumerate(losses):
        before = losses[max(0, number - 128) : number]
        if (z := spikes.see(loss)) is not None:
            middle = median(before)
            found[number] = z
            assert z == pytest.approx((loss - middle) / (1.4826 * median(abs(value - middle) for value in before)))
    assert list(found) == [200]
    assert spikes.count == 1
    again = Spikes(6.0, losses=json.loads(json.dumps(list(spikes.losses))), count=1)
    assert again.see(0.5) is None, "a loss that falls is none"
    assert again.see(2.0) is not None


def test_spikes_are_counted_in_the_records_and_the_run_is_left_alone(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("train.steps=40", "health.spike_z=1e-3")
    folder, calm = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "calm"))
    run_training(config, folder, LocalContext())
    run_training(load_tiny("train.steps=40", "health.spike_z=1e6"), calm, LocalContext())
    counts = values(folder, "train/spikes")
    assert counts[20] == 0
    assert 0 < counts[40] <= 20
    assert values(calm, "train/spikes")[40] == 0
    assert values(folder, "train/loss") == values(calm, "train/loss")
