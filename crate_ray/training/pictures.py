"""The pictures of a run: its encoder beside the same seed's untrained encoder, on the same validation images.

In: a finished run folder. Out: PNG files in RUN/pictures/, `emergence.json` beside them, and the emergence values as
records at the run's last step. Everything is computed before the first file is written, and made again under the same
names. Computed in float32, whatever the run trained in: one pass over a few hundred images, where precision costs little.
The trade-off: both encoders walk their layers side by side, so that one layer's keys are held twice, and never two layers'.

Shapes: A all images looked at, B pictured ones (the first of them), C channels, H height, W width, N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import load_index
from crate_ray.evaluation.attention import LayerView, default_layers, view_layers
from crate_ray.evaluation.coding_rate import coding_rate_ceiling, coding_rate_floor
from crate_ray.evaluation.emergence import foreground, key_colours
from crate_ray.evaluation.figures import (
    BLUE,
    VERMILION,
    Curve,
    Panel,
    colour_maps,
    enlarge_patches,
    label_grid,
    plot_layers,
    require_matplotlib,
)
from crate_ray.evaluation.pictures import reconstruct, to_pixels
from crate_ray.evaluation.whitebox import LayerMeasures, measure_layers
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.models.patches import patchify
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import Checkpoint
from crate_ray.training.ema import weights_file
from crate_ray.training.emergence import Emergence, emergence_panels, record_emergence
from crate_ray.training.evaluate import read_images, spread_ids
from crate_ray.training.objective import Normalise
from crate_ray.training.probes import finished_checkpoint, untrained

NUM_IMAGES = 256
NUM_PICTURED = 5
NUM_MEASURED = 64
_MAP_TILE = 96

# Panels of the layer-wise figure: title, unit, and the measures that share the axes, each with its name there.
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("coding rate", "nats", {"coding_rate_pre_nats": "before attention", "coding_rate_post_nats": "after attention"}),
    ("non-zero entries after ISTA", "share", {"nonzero_fraction": ""}),
    ("ISTA: step size against curvature", r"$\eta\,\sigma_{\max}(D)^2$", {"ista_descent_ratio": ""}),
    ("ISTA: objective after the step / before", "ratio", {"ista_objective_ratio": ""}),
    ("dictionary: mutual coherence", "largest |cosine|", {"dictionary_coherence": ""}),
    ("subspaces: overlap between heads", "share", {"subspace_overlap": ""}),
)


@dataclass
class Pictures:
    """What was made for a run.

    Attributes:
        files: URIs, in the order in which they were written.
        left_out: One line for each picture that this run cannot have.
        emergence: Content of emergence.json; None without object masks.
    """

    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    emergence: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Subject:
    """What is looked at: two encoders, and the images that both see."""

    run: str
    config: RunConfig
    step: int
    trained: MaskedAutoencoder | Classifier
    untrained: MaskedAutoencoder | Classifier
    ids_A: NDArray[np.int64]
    images_ACHW: Tensor
    noise_AN: Tensor
    pictured_B: Tensor

    @classmethod
    def load(cls, folder: RunFolder, checkpoint: Checkpoint) -> Self:
        """Reads images spread over the validation shards, with the masks under which the run's loss is measured."""
        config = folder.read_config()
        assert config.data.eval is not None
        trained, control = untrained(config).eval(), untrained(config).eval()
        trained.load_state_dict(checkpoint.read(weights_file(config, checkpoint)))
        if not all(weight.isfinite().all() for weight in trained.parameters()):
            raise ConfigError(f"run '{folder.name}' diverged: its weights hold NaN or infinity, so there is nothing to picture")
        ids_A = spread_ids(load_index(config.data.eval).num_samples, NUM_IMAGES)
        normalise = Normalise(config.data.mean, config.data.std)
        images, noise = [], []
        for batch in read_images(config, config.data.eval, sample_ids=ids_A, noise=True):
            assert batch.noise_BN is not None
            images.append(normalise(batch.images_BCHW))
            noise.append(batch.noise_BN)
        # Drawn, not spread: classes often take turns in the index, and an even stride would picture one of them.
        pictured_B = torch.randperm(len(ids_A), generator=torch.Generator().manual_seed(0))[:NUM_PICTURED]
        return cls(
            folder.name, config, checkpoint.step, trained, control, ids_A, torch.cat(images), torch.cat(noise), pictured_B
        )

    @property
    def device(self) -> torch.device:
        return next(self.trained.parameters()).device

    @property
    def names(self) -> list[str]:
        """The pictured images, as rows of the validation index."""
        return [f"image {sample_id}" for sample_id in self.ids_A[self.pictured_B.numpy()]]

    @property
    def pictured_pixels(self) -> Tensor:
        return self.pixels(self.images_ACHW[self.pictured_B])

    def pixels(self, images_BCHW: Tensor) -> Tensor:
        return to_pixels(images_BCHW, mean=self.config.data.mean, std=self.config.data.std)

    def title(self, what: str) -> str:
        return f"{self.run}, step {self.step:,}: {what}"


def check_pictures(folder: RunFolder, layers: Sequence[int] = ()) -> tuple[int, ...]:
    """Refuses, before any work, what `draw_pictures` could not do; gives the layers that it would draw.

    Raises:
        ConfigError: No validation images, no such layer, or matplotlib is not installed.
    """
    require_matplotlib()
    config = folder.read_config()
    if config.data.eval is None:
        raise ConfigError(f"run '{folder.name}' has no data.eval; its pictures are of validation images")
    depth = config.model.encoder_depth
    wrong = [layer for layer in layers if not 1 <= layer <= depth]
    if wrong:
        raise ConfigError(f"run '{folder.name}' has no encoder layer {wrong[0]}; valid: 1 to {depth}")
    return tuple(layers) or default_layers(depth)


def draw_pictures(folder: RunFolder, *, layers: Sequence[int] = ()) -> Pictures:
    """Makes every picture that a finished run can have, and writes them to its folder.

    Args:
        folder: The run.
        layers: Encoder layers whose attention and keys are drawn, from 1; the last two by default.

    Returns:
        What was made, and why the rest was not.

    Raises:
        ConfigError: As `check_pictures`; or the run is not finished, or diverged.
    """
    chosen = check_pictures(folder, layers)
    subject = _Subject.load(folder, finished_checkpoint(folder))
    made = Pictures()
    content = {**_draw_reconstructions(subject, made), **_draw_layers(subject, made, chosen), **_draw_curves(subject, made)}
    for name, data in content.items():
        made.files.append(folder.path("pictures", name))
        storage.write_atomic(made.files[-1], data)
    if made.emergence is not None:
        folder.write_json("pictures/emergence.json", made.emergence)
        made.files.append(folder.path("pictures", "emergence.json"))
        record_emergence(folder, made.emergence)
    return made


def _draw_reconstructions(subject: _Subject, made: Pictures) -> dict[str, bytes]:
    if isinstance(subject.trained, Classifier) or isinstance(subject.untrained, Classifier):
        made.left_out.append("reconstructions: a classifier predicts classes and has no decoder")
        return {}
    images = subject.images_ACHW[subject.pictured_B].to(subject.device)
    noise = subject.noise_AN[subject.pictured_B].to(subject.device)
    trained, control = reconstruct(subject.trained, images, noise), reconstruct(subject.untrained, images, noise)
    columns = {
        "original": images,
        "what it sees": trained.visible,
        "reconstruction": trained.pasted,
        "raw\nprediction": trained.predicted,
        "reconstruction,\nuntrained": control.pasted,
    }
    note = [
        f"{subject.trained.config.mask_ratio:.0%} of the patches hidden, by the masks of the validation loss.",
        "Reconstruction: the prediction in the hidden patches, the image itself in the others.",
        "Raw prediction: in visible patches too, where no loss was ever taken.",
    ]
    if subject.trained.config.norm_pix_loss:
        note.append("Trained on normalised patches: each patch's true mean and variance were put back, hidden ones too.")
    tiles = {name: subject.pixels(column) for name, column in columns.items()}
    title = subject.title("reconstructions of validation images")
    return {"reconstructions.png": label_grid(tiles, subject.names, title=title, note=note)}


def _draw_layers(subject: _Subject, made: Pictures, chosen: Sequence[int]) -> dict[str, bytes]:
    """Walks both encoders once: attention maps and keys of the chosen layers, emergence of all."""
    emergence = _read_emergence(subject, made)
    content: dict[str, bytes] = {}
    walk = (view_layers(model, subject.images_ACHW) for model in (subject.trained, subject.untrained))
    for trained, control in zip(*walk, strict=True):
        if trained.number in chosen:
            content[f"attention_layer{trained.number:02d}.png"] = _draw_attention(subject, trained, control)
            content[f"keys_layer{trained.number:02d}.png"] = _draw_keys(subject, trained, control)
        if emergence is not None:
            emergence.add_layer(trained, control)
    if emergence is not None:
        made.emergence = summary = emergence.summarise(step=subject.step)
        title = subject.title("do objects emerge? Jaccard index with the object masks")
        note = (
            f"{summary['num_images']} validation images; bands: 95% intervals; the best head is chosen with the mask in sight"
        )
        content["emergence.png"] = plot_layers(emergence_panels(summary), title=title, note=note)
    return content


def _read_emergence(subject: _Subject, made: Pictures) -> Emergence | None:
    patches_ANQ = patchify(subject.images_ACHW, subject.trained.config.patch_size)
    try:
        return Emergence.read(subject.config, subject.ids_A, patches_ANQ)
    except ConfigError as error:
        made.left_out.append(f"emergence: {error}")
        return None


def _draw_attention(subject: _Subject, trained: LayerView, control: LayerView) -> bytes:
    """Two rows an image, trained and untrained; a column a head."""
    side = subject.trained.config.image_size
    chosen = [view.cls_attention_BHN[subject.pictured_B] for view in (trained, control)]
    columns = {"image": subject.pictured_pixels.repeat_interleave(2, dim=0)}
    for head in range(trained.cls_attention_BHN.shape[1]):
        pair = [colour_maps(attention_BHN[:, head], side) for attention_BHN in chosen]
        columns[f"head {head + 1}"] = torch.stack(pair, dim=1).flatten(0, 1)
    rows = [f"{name}\n{which}" for name in subject.names for which in ("trained", "untrained")]
    title = subject.title(
        f"attention of the class token, encoder layer {trained.number} of {len(subject.trained.encoder_layers)}"
    )
    note = [
        "Whole images, nothing hidden. Attention to patches, enlarged without smoothing;",
        "each map from its own least (dark) to its own largest weight (bright).",
        "Published pictures show the last layer (the authors' book) or the one before it (their code).",
    ]
    return label_grid(columns, rows, title=title, note=note, tile_side=_MAP_TILE if side > _MAP_TILE else None)


def _draw_keys(subject: _Subject, trained: LayerView, control: LayerView) -> bytes:
    side = subject.trained.config.image_size
    columns = {"image": subject.pictured_pixels}
    for which, view in (("trained", trained), ("untrained", control)):
        front_AN = foreground(view.keys_BND)
        colours_AN3 = key_colours(view.keys_BND, front_AN)
        white_BN3 = front_AN[subject.pictured_B].double().unsqueeze(-1).expand(-1, -1, 3)
        columns[f"foreground,\n{which}"] = enlarge_patches(white_BN3, side)
        columns[f"keys,\n{which}"] = enlarge_patches(colours_AN3[subject.pictured_B], side)
    title = subject.title(
        f"principal components of the keys, encoder layer {trained.number} of {len(subject.trained.encoder_layers)}"
    )
    note = [
        f"Foreground: one component over {len(trained.keys_BND)} images, cut at each one's mean; its border decides the side.",
        "Keys: three components of the foreground's keys as red, green and blue, stretched in each image.",
    ]
    return label_grid(columns, subject.names, title=title, note=note)


def _draw_curves(subject: _Subject, made: Pictures) -> dict[str, bytes]:
    images = subject.images_ACHW[:NUM_MEASURED].to(subject.device)
    trained, control = measure_layers(subject.trained, images), measure_layers(subject.untrained, images)
    panels = [panel for panel in (_panel(*row, trained, control) for row in _PANELS) if panel.curves]
    config = subject.trained.config
    if not panels:
        kind = " ".join([config.family, *config.ablation])
        made.left_out.append(f"layer-wise curves: none of the white-box measures is defined for the family {kind}")
        return {}
    head_width = config.width // config.num_heads
    bounds = {
        "ceiling: subspaces filled evenly": coding_rate_ceiling(config.num_heads, 1 + config.num_patches, head_width),
        "floor: one line a subspace": coding_rate_floor(config.num_heads, head_width),
    }
    if config.is_tied:
        panels[0] = replace(panels[0], levels=bounds)
    title = subject.title("layer by layer, beside the same encoder untrained")
    note = f"means over {len(images)} whole validation images; training shows in the distance from the untrained curve"
    return {"layers.png": plot_layers(panels, title=title, note=note)}


def _panel(title: str, unit: str, names: dict[str, str], trained: list[LayerMeasures], control: list[LayerMeasures]) -> Panel:
    """The curves of the measures that are defined."""
    curves = []
    for (name, label), colour in zip(names.items(), (VERMILION, BLUE), strict=False):
        for layers, is_trained in ((trained, True), (control, False)):
            values = [getattr(layer, name) for layer in layers]
            if any(value is not None for value in values):
                curves.append(Curve(label, values, colour, is_trained=is_trained))
    return Panel(title, unit, curves, {"above: descent not certain": 2.0} if "ista_descent_ratio" in names else {})
