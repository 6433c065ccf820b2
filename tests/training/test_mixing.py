"""Mixup and cutmix of pairs: torchvision's own result on a pair, the same for every way to split the batch."""

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from crate_ray.config import DataConfig
from crate_ray.data.streams import Purpose, stream
from crate_ray.training.mixing import PairMixing

CLASSES = 5
SETTINGS = {
    "mixup": {"mixup_alpha": 0.8},
    "cutmix": {"cutmix_alpha": 1.0},
    "both": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}
KINDS = pytest.mark.parametrize("kind", SETTINGS)


def mixing(kind: str, seed: int = 3) -> PairMixing:
    return PairMixing(DataConfig.parse({"train": "shards", **SETTINGS[kind]}), num_classes=CLASSES, seed=seed)


def draw_rows(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, CLASSES, (rows,), generator=generator)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("cursor", [8, 16, 24])
def test_each_pair_is_what_torchvision_makes_of_it_alone(kind: str, cursor: int) -> None:
    images, labels = draw_rows(8)
    mixed, targets = mixing(kind)(images, labels, cursor=cursor)
    alone = v2.MixUp(alpha=0.8, num_classes=CLASSES) if kind == "mixup" else v2.CutMix(alpha=1.0, num_classes=CLASSES)
    torchvisions = v2.RandomChoice([alone])
    for first in range(0, 8, 2):
        pair = slice(first, first + 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(stream(Purpose.MIX, seed=3, item=cursor).integers(2**63)))
            expected_images, expected_targets = torchvisions(images[pair].float(), labels[pair])
        assert torch.equal(mixed[pair], expected_images)
        assert torch.equal(targets[pair], expected_targets)


@KINDS
def test_workers_and_micro_batches_mix_as_one_batch_does(kind: str) -> None:
    images, labels = draw_rows(12)
    mixed, targets = mixing(kind)(images, labels, cursor=40)
    for cut in (2, 4, 6):
        parts = [mixing(kind)(images[a : a + cut], labels[a : a + cut], cursor=40) for a in range(0, 12, cut)]
        assert torch.equal(torch.cat([part[0] for part in parts]), mixed)
        assert torch.equal(torch.cat([part[1] for part in parts]), targets)


@KINDS
def test_a_step_mixes_the_same_again_and_other_steps_and_seeds_mix_differently(kind: str) -> None:
    images, labels = draw_rows(4)

    def mixed(seed: int, cursor: int) -> bytes:
        return bytes(mixing(kind, seed)(images, labels, cursor=cursor)[0].numpy().tobytes())

    assert mixed(0, 8) == mixed(0, 8)
    assert len({mixed(seed, cursor) for seed in (0, 1) for cursor in (8, 16, 24)}) >= 5  # a cutmix box may be empty


@KINDS
def test_torchs_generator_is_left_as_it_was(kind: str) -> None:
    before = torch.get_rng_state()
    mixing(kind)(*draw_rows(4), cursor=8)
    assert torch.equal(torch.get_rng_state(), before)


@KINDS
def test_targets_are_shares_of_the_two_labels_of_a_pair(kind: str) -> None:
    images, labels = draw_rows(6)
    _, targets = mixing(kind)(images, labels, cursor=8)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
    for row in range(6):
        assert set(targets[row].nonzero().flatten().tolist()) <= {int(labels[row]), int(labels[row ^ 1])}


def test_both_are_used_in_turn() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1] = 255
    blends = [mixing("both")(images, torch.tensor([0, 1]), cursor=8 * step)[0] for step in range(40)]
    kinds = [bool(((blend > 0) & (blend < 255)).any()) for blend in blends]  # only mixup makes grey
    assert 10 <= sum(kinds) <= 30
