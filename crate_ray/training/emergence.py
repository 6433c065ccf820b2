"""Emergence of a run: object masks from its shards, scores of every layer, and where they are kept.

In: validation shards with object masks, and views of the layers of a trained and an untrained encoder. Out: intervals by
layer as one JSON body, the records `emergence/layer03/attention_jaccard`, ..., and the panels of a figure.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import load_index, read_masks
from crate_ray.evaluation.attention import LayerView
from crate_ray.evaluation.emergence import EMERGENCE_PROTOCOL, Scores, object_patches, score_layer, trivial_scores
from crate_ray.evaluation.figures import BLUE, VERMILION, Curve, Panel
from crate_ray.evaluation.intervals import Interval, mean_interval
from crate_ray.runs import RunFolder, later_records, read_records

RECORDED = ("attention_jaccard", "attention_mean_jaccard", "foreground_jaccard")
"""Measures that become records, each with its gain over the untrained encoder; emergence.json holds all of them."""

_TITLES = {
    "attention_jaccard": "class token's attention, 60% of the mass, best head",
    "attention_mean_jaccard": "the same, mean over heads",
    "foreground_jaccard": "foreground by PCA of the keys",
}
# What each measure is to be believed against: (trivial rival, its measure, name in the figure).
_RIVALS = (("all_patches", "jaccard", "every patch"), ("centre", "jaccard", "central patches"))
_RIVALS_OF = {
    "attention_jaccard": (*_RIVALS, ("random_attention", "attention_jaccard", "random maps, best")),
    "attention_mean_jaccard": (*_RIVALS, ("random_attention", "attention_mean_jaccard", "random maps, mean")),
    "foreground_jaccard": (*_RIVALS, ("pixels", "foreground_jaccard", "PCA of raw pixels")),
}


@dataclass
class Emergence:
    """Object masks of some images, and the scores of both encoders as their layers are added.

    Attributes:
        object_BN: Which patches lie on the object, of the images that have such a patch.
        usable_A: Which of all A images those are.
        sources_B: Source image of each, for the intervals.
        trivial: Scores without a model.
        trained: Scores of each layer added so far.
        untrained: The same of the untrained encoder.
    """

    object_BN: Tensor
    usable_A: Tensor
    sources_B: NDArray[Any]
    trivial: dict[str, Scores]
    trained: list[Scores] = field(default_factory=list)
    untrained: list[Scores] = field(default_factory=list)

    @classmethod
    def read(cls, config: RunConfig, ids: NDArray[np.int64], patches_ANQ: Tensor) -> "Emergence":
        """Reads the masks of validation images.

        Args:
            config: Of the run; data.eval is set.
            ids: The A images.
            patches_ANQ: Their pixels, a row a patch.

        Raises:
            ConfigError: The shards hold no masks, or one that cannot be read, or no object fills half of any patch.
        """
        url = str(config.data.eval)
        object_AN = object_patches(read_masks(url, ids, image_size=config.model.image_size), config.model.patch_size)
        usable_A = object_AN.any(dim=1)
        if not usable_A.any():
            size = config.model.patch_size
            raise ConfigError(f"in {len(ids)} images of {url} no object fills half of any patch of {size} x {size} pixels")
        object_BN = object_AN[usable_A]
        trivial = trivial_scores(patches_ANQ[usable_A], object_BN, num_heads=config.model.num_heads)
        return cls(object_BN, usable_A, load_index(url).sources[ids][usable_A.numpy()], trivial)

    def add_layer(self, trained: LayerView, untrained: LayerView) -> None:
        """Scores the next layer of both encoders."""
        for view, scores in ((trained, self.trained), (untrained, self.untrained)):
            usable = LayerView(view.number, view.cls_attention_BHN[self.usable_A], view.keys_BND[self.usable_A])
            scores.append(score_layer(usable, self.object_BN))

    def summarise(self, *, step: int) -> dict[str, Any]:
        """Means with 95% intervals over source images as [value, low, high]: the content of emergence.json."""
        return {
            "protocol": EMERGENCE_PROTOCOL,
            "step": step,
            "num_images": len(self.object_BN),
            "images_without_object_patch": int((~self.usable_A).sum()),
            "object_share_of_patches": round(float(self.object_BN.float().mean()), 4),
            "layers": [
                {"layer": number, **{name: self._beside(trained[name], untrained[name]) for name in trained}}
                for number, (trained, untrained) in enumerate(zip(self.trained, self.untrained, strict=True), start=1)
            ],
            "trivial": {
                rival: {name: self._interval(values) for name, values in scores.items()}
                for rival, scores in self.trivial.items()
            },
        }

    def _beside(self, trained_B: NDArray[np.float64], untrained_B: NDArray[np.float64]) -> dict[str, list[float]]:
        values = {"trained": trained_B, "untrained": untrained_B, "gain": trained_B - untrained_B}
        return {name: self._interval(value) for name, value in values.items()}

    def _interval(self, values_B: NDArray[np.float64]) -> list[float]:
        found = mean_interval(values_B, self.sources_B)
        return [round(number, 4) for number in (found.value, found.low, found.high)]


def emergence_panels(summary: dict[str, Any]) -> list[Panel]:
    """The recorded measures by layer, trained beside untrained, over what needs no model."""
    panels = []
    for name, title in _TITLES.items():
        curves = [
            Curve("", [Interval(*layer[name][which]) for layer in summary["layers"]], colour, is_trained=which == "trained")
            for which, colour in (("trained", VERMILION), ("untrained", BLUE))
        ]
        levels = {label: summary["trivial"][rival][measure][0] for rival, measure, label in _RIVALS_OF[name]}
        panels.append(Panel(title, "Jaccard index", curves, levels))
    return panels


def record_emergence(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Writes the recorded measures as records of the run's last step, unless they stand there already."""
    values = {}
    for layer in summary["layers"]:
        for name in RECORDED:
            key = f"emergence/layer{layer['layer']:02d}/{name}"
            values[key], values[f"{key}_gain"] = layer[name]["trained"][0], layer[name]["gain"][0]
    held = next((record.values for record in read_records(folder) if record.step == summary["step"]), {})
    if all(held.get(key) == value for key, value in values.items()):
        return
    with later_records(folder) as writer:
        writer.write(summary["step"], values)
