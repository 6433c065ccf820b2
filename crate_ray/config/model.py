"""The shape of a model, and the named presets.

In: a preset name or explicit keys. Out: a ModelConfig with every key filled in, so that
what a run records never depends on a later default. The keys are those of the metadata
in tests/golden, so that a published case is a ModelConfig.
"""

import math
from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, field_validator, model_validator

from crate_ray.config.base import ConfigError, Frozen, nearest

PerLayer = float | tuple[float, ...]


class ModelConfig(Frozen):
    """Architecture of one masked autoencoder or classifier.

    `ista_step_size` (eta) and `ista_lambda` are one number, or one for each encoder layer.
    Keys left out take the published value of the family; `attention`, `feedforward`, `mlp_ratio` and `share_layers` change
    the encoder alone, and at the family's value they are None, so that one model has one identity. With `num_classes` the
    model is a classifier, and the keys of mask and decoder say nothing.
    """

    family: Literal["crate", "vit"]
    encoder_tokens: Literal["all", "visible"] = "all"
    image_size: int = Field(224, ge=1)
    patch_size: int = Field(16, ge=1)
    width: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    encoder_depth: int = Field(ge=1)
    decoder_width: int = Field(ge=1)
    decoder_depth: int = Field(ge=1)
    decoder_num_heads: int = Field(ge=1)
    ista_step_size: PerLayer = 0.1
    ista_lambda: PerLayer
    ista_learnable: Literal["none", "layer"] = "none"
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False
    qkv_bias: bool
    block_norm_eps: float = Field(gt=0)
    final_norm_eps: float = Field(gt=0)
    num_classes: int | None = Field(None, ge=2)
    embedding: Literal["linear", "normed"] | None = Field(
        None, description="of a classifier: as in the autoencoders, or between norms"
    )
    pool: Literal["cls", "mean"] | None = Field(
        None, description="what a classifier's head reads: class token or mean of the patches"
    )
    attention: Literal["tied", "untied"] | None = Field(
        None,
        description="of the encoder: queries, keys and values one projection or three; default, and null: as the family has it",
    )
    feedforward: Literal["ista", "mlp"] | None = Field(
        None, description="of the encoder's second half-layer; default, and null: as the family has it"
    )
    mlp_ratio: float | None = Field(None, gt=0, description="hidden width of an encoder's perceptron over its width; default 4")
    share_layers: Literal[True] | None = Field(
        None, description="all encoder layers are one layer, applied encoder_depth times"
    )
    parametrization: Literal["standard", "mup"] = "standard"
    mup_base_width: int | None = Field(
        None, ge=1, description="of mup: the width whose rates and initialisation are the published ones; default: the preset's"
    )
    mup_base_num_heads: int | None = Field(
        None, ge=1, description="of mup: heads at that width; a head is as wide at every width"
    )
    mup_base_decoder_width: int | None = Field(
        None,
        ge=1,
        description="of mup: the decoder's width at that width; default: mup_base_width where decoder_width is width",
    )
    mup_base_decoder_num_heads: int | None = Field(
        None, ge=1, description="of mup: the decoder's heads at that width; default: as for its width"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        preset = values.pop("preset", None)
        if preset is not None:
            # A preset of a fixed width with another one asked for keeps its other keys.
            values = _scale_preset({**preset_values(preset), **values}, preset_values(preset), given=values)
        return _fill_defaults(values)

    @model_validator(mode="wrap")
    @classmethod
    def _remember_given(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """`model_fields_set` holds what the recipe says, not the defaults that `_expand` filled in."""
        config = handler(values)
        if isinstance(values, dict):
            config.model_fields_set.intersection_update(values)
        return config

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size} is smaller than one patch of patch_size = {self.patch_size}; "
                f"use an image size of at least {2 * self.patch_size}, or smaller patches"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size} is not a multiple of patch_size = {self.patch_size}; "
                f"use an image size of {max(self.image_size // self.patch_size, 2) * self.patch_size}"
            )
        if self.parametrization == "mup":
            self._check_width_transfer()
        for width, heads, name in (
            (self.width, self.num_heads, ""),
            (self.decoder_width, self.decoder_num_heads, "decoder_"),
        ):
            if width % heads:
                raise ValueError(
                    f"{name}width = {width} is not divisible by {name}num_heads = {heads}; valid head counts: "
                    f"{', '.join(str(h) for h in range(1, width + 1) if width % h == 0)}"
                )
            if width % 4:
                raise ValueError(f"{name}width = {width} must be a multiple of 4: sin-cos positions have four parts")
        if self.num_classes is None:
            self._check_masking()
        elif not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} is no share of the patches, and a classifier hides none: leave mask_ratio out"
            )
        self._check_classifier()
        self._check_ablation()
        for name in ("ista_step_size", "ista_lambda"):
            value = getattr(self, name)
            layers = value if isinstance(value, tuple) else (value,) * self.encoder_depth
            if len(layers) != self.encoder_depth:
                raise ValueError(
                    f"{name} has {len(layers)} values; give one, or one for each of the {self.encoder_depth} layers"
                )
            if self.ista_learnable == "layer" and 0 in layers:
                raise ValueError(
                    f"ista_learnable = layer trains logarithms, but {name} = {value} holds a 0; start from positive values, or "
                    "set ista_learnable to none"
                )
        return self

    @field_validator("ista_step_size", "ista_lambda", mode="before")
    @classmethod
    def _check_scalars(cls, value: Any) -> Any:
        """One message, where pydantic would give one for each kind of value."""
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v < math.inf for v in numbers):
            raise ValueError("give a finite number of at least 0, or a list of one for each encoder layer")
        return value

    def _check_classifier(self) -> None:
        kind = (self.family, self.embedding, self.pool)
        if self.num_classes is None:
            if kind[1:] != (None, None):
                raise ValueError(
                    f"embedding = {self.embedding} and pool = {self.pool} belong to classifiers: set num_classes, or drop them"
                )
        elif self.embedding == "normed" and kind != ("crate", "normed", "cls"):
            raise ValueError(
                f"family = {self.family}, embedding = normed, pool = {self.pool}: no such classifier; valid: the published one "
                "(family crate, embedding normed, pool cls), or embedding linear with either family and either pool"
            )

    def _check_ablation(self) -> None:
        """Refuses keys of a half-layer that the encoder does not have."""
        without_ista = "feedforward = mlp" if self.feedforward else "family vit"
        if not self.has_ista and self.ista_learnable != "none":
            raise ValueError(
                f"ista_learnable = {self.ista_learnable} trains step sizes and lambdas, and {without_ista} has none: leave it "
                "out, or use an encoder that has ISTA steps (family crate)"
            )
        if self.has_ista and self.mlp_ratio is not None:
            raise ValueError(
                f"mlp_ratio = {self.mlp_ratio:g} is of a perceptron, and this encoder has ISTA steps: leave it out, or set "
                "feedforward to mlp"
            )
        if not self.has_ista and self.mlp_width < 1:
            raise ValueError(f"mlp_ratio = {self.mlp_ratio:g} of width = {self.width} is no hidden unit; use a larger ratio")
        if self.attention == "tied" and self.qkv_bias:
            raise ValueError(
                "qkv_bias = True is of three projections, and attention = tied has one, without a bias: leave qkv_bias out"
            )
        lists = [name for name in ("ista_step_size", "ista_lambda") if isinstance(getattr(self, name), tuple)]
        if self.share_layers and (self.encoder_depth == 1 or lists):
            reason = "encoder_depth = 1 has one layer" if self.encoder_depth == 1 else f"{lists[0]} has a value for each layer"
            raise ValueError(f"share_layers = True makes all layers one, and {reason}: leave share_layers out, or change that")

    def _check_masking(self) -> None:
        n = self.num_patches
        if n == 1:
            raise ValueError(
                f"image_size = {self.image_size} is one patch of patch_size = {self.patch_size}, and one must be kept and "
                f"one masked; use an image size of at least {2 * self.patch_size}, or smaller patches"
            )
        if not 1 <= self.num_kept < n or not 0 <= self.mask_ratio <= 1:
            # Rounded down, past the truncation of num_kept: the printed ratio must itself be valid.
            largest = math.floor(1e4 * (1 - 1 / n) - 1e-6) / 1e4
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} keeps {self.num_kept} of {n} patches; at least one must be kept and "
                f"one masked: use a ratio above 0 and up to {largest:.4f}"
            )
        if self.encoder_tokens == "all" and self.decoder_width != self.width:
            raise ValueError(
                f"decoder_width = {self.decoder_width} must equal width = {self.width} when encoder_tokens = all: the mask "
                "token enters before the encoder; set decoder_width to the width, or encoder_tokens to visible"
            )

    def _check_width_transfer(self) -> None:
        """Every layer is `width_ratio` times as wide as in the base model, and has as many times its heads."""
        scaled = _SCALED if self.num_classes is None else _SCALED[:1]
        is_one_shape = (self.decoder_width, self.decoder_num_heads) == (self.width, self.num_heads)
        needed = ("width", *(_SCALED[:1] if is_one_shape else scaled))
        missing = [f"mup_base_{key}" for key in needed if getattr(self, f"mup_base_{key}") is None]
        if missing:
            raise ValueError(
                f"parametrization = mup needs {', '.join(missing)}: the shape whose learning rate and initialisation are the "
                "published ones, such as mup_base_width = 128 with mup_base_num_heads = 4 (a preset brings its own)"
            )
        base = self.mup_base_width
        assert base is not None
        for key in scaled:
            value, base_value = getattr(self, key), getattr(self, f"mup_base_{key}")
            wanted, is_between = divmod(base_value * self.width, base)
            if is_between:
                unit = base // math.gcd(base, base_value)
                near = max(self.width // unit, 1) * unit
                raise ValueError(
                    f"width = {self.width} is {self.width_ratio:.4g} times mup_base_width = {base}, and {key} would have to be "
                    f"as many times mup_base_{key} = {base_value}; use a width of {near} or {near + unit}"
                )
            if value != wanted:
                raise ValueError(
                    f"{key} = {value} at width = {self.width}, but mup_base_{key} = {base_value} at mup_base_width = {base}; "
                    f"with mup a head is as wide at every width, and the decoder grows with the encoder: set {key} to {wanted}"
                )

    @property
    def ablation(self) -> tuple[str, ...]:
        """How the encoder's layers differ from its family's, as in ("untied", "mlp", "r0.5"); no published code has such."""
        ratio = None if self.mlp_ratio is None else f"r{self.mlp_ratio:g}"
        words = (self.attention, self.feedforward, ratio, "shared" if self.share_layers else None)
        return tuple(word for word in words if word is not None)

    @property
    def is_tied(self) -> bool:
        """Whether queries, keys and values of an encoder layer are one projection."""
        return self.attention == "tied" if self.attention else self.family == "crate"

    @property
    def has_ista(self) -> bool:
        """Whether the second half of an encoder layer is an ISTA step, and not a perceptron."""
        return self.feedforward == "ista" if self.feedforward else self.family == "crate"

    @property
    def num_encoder_layers(self) -> int:
        """Encoder layers with weights of their own: one where all share it."""
        return 1 if self.share_layers else self.encoder_depth

    @property
    def mlp_width(self) -> int:
        """Hidden units of an encoder layer's perceptron."""
        return round((_MLP_RATIO if self.mlp_ratio is None else self.mlp_ratio) * self.width)

    @property
    def width_ratio(self) -> float:
        """Of mup: how many times as wide as its base model it is; 1 in the standard parametrization."""
        if self.parametrization == "standard":
            return 1.0
        assert self.mup_base_width is not None
        return self.width / self.mup_base_width

    @property
    def num_patches(self) -> int:
        """Patches of an image, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_kept(self) -> int:
        """Patches that stay visible; truncation as in the published code."""
        return self.kept_at(self.mask_ratio)

    def kept_at(self, mask_ratio: float) -> int:
        """Patches that stay visible at another mask ratio."""
        return int(self.num_patches * (1 - mask_ratio))

    def per_layer(self, name: Literal["ista_step_size", "ista_lambda"]) -> tuple[float, ...]:
        """The value for each encoder layer."""
        value: PerLayer = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * self.encoder_depth


_MLP_RATIO = 4
_SCALED = ("num_heads", "decoder_width", "decoder_num_heads")


def _scale_preset(values: dict[str, Any], preset: dict[str, Any], *, given: dict[str, Any]) -> dict[str, Any]:
    """With mup a preset is the base model: what is not given beside its width is as many times as large as the width."""
    if values.get("parametrization") != "mup" or not isinstance(values["width"], int):
        return values
    present = [key for key in _SCALED if key in preset]
    base = {f"mup_base_{key}": preset[key] for key in ("width", *present)}
    scaled = {key: preset[key] * values["width"] // preset["width"] for key in present if key not in given}
    return {**base, **values, **scaled}


def _fill_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The published value of each key that depends on the family.

    A classifier of linear embedding has the encoder of an autoencoder, and its values; for vit those of facebookresearch/mae.
    """
    vit = values.get("family") == "vit"
    classifier = values.get("num_classes") is not None
    facebook = vit and (classifier or values.get("encoder_tokens") == "visible")
    embedding = values.get("embedding") or ("linear" if vit else "normed")
    published_classifier = classifier and embedding == "normed"
    defaults = {
        "decoder_width": values.get("width"),
        "decoder_num_heads": values.get("num_heads"),
        "decoder_depth": 8 if vit else values.get("encoder_depth"),
        "ista_lambda": 0.1 if published_classifier else 0.5,
        "qkv_bias": facebook and values.get("attention") != "tied",
        "block_norm_eps": 1e-6 if facebook else 1e-5,
        "final_norm_eps": 1e-5 if published_classifier else 1e-6,
        "embedding": embedding if classifier else None,
        "pool": ("mean" if vit else "cls") if classifier else None,
    }
    if values.get("parametrization") == "mup" and not classifier:
        if "decoder_width" not in values or values.get("encoder_tokens") != "visible":
            defaults["mup_base_decoder_width"] = values.get("mup_base_width")
        if "decoder_num_heads" not in values:
            defaults["mup_base_decoder_num_heads"] = values.get("mup_base_num_heads")
    filled = {key: value for key, value in defaults.items() if values.get(key) is None and value is not None}
    return {**values, **filled, **_unset_ablation(values, vit=vit)}


def _unset_ablation(values: dict[str, Any], *, vit: bool) -> dict[str, Any]:
    """What is asked for and is so in the family anyway becomes None; a sweep over both values names one model each."""
    attention, feedforward = ("untied", "mlp") if vit else ("tied", "ista")
    own: dict[str, Any] = {"attention": attention, "feedforward": feedforward, "share_layers": False}
    if (values.get("feedforward") or feedforward) == "mlp":
        own["mlp_ratio"] = _MLP_RATIO
    return {key: None for key, value in own.items() if key in values and values[key] == value}


def _crate(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {"family": "crate", "encoder_tokens": "all", "width": width, "num_heads": heads, "encoder_depth": depth}


def _vit(width: int, heads: int, depth: int, tokens: str, decoder_width: int, decoder_heads: int) -> dict[str, Any]:
    return {
        "family": "vit",
        "encoder_tokens": tokens,
        "width": width,
        "num_heads": heads,
        "encoder_depth": depth,
        "decoder_width": decoder_width,
        "decoder_depth": 8,
        "decoder_num_heads": decoder_heads,
    }


_CRATE_SIZES = {"tiny": (384, 6, 12), "small": (576, 12, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}

PRESETS: dict[str, dict[str, Any]] = {
    **{f"crate_mae_{size}": _crate(*shape) for size, shape in _CRATE_SIZES.items()},
    **{f"crate_mae_visible_{size}": {**_crate(*shape), "encoder_tokens": "visible"} for size, shape in _CRATE_SIZES.items()},
    **{f"crate_{size}": {**_crate(*shape), "num_classes": 1000} for size, shape in _CRATE_SIZES.items()},
    "mae_small": _vit(384, 6, 12, "visible", 512, 16),
    "mae_base": _vit(768, 12, 12, "visible", 512, 16),
    "mae_large": _vit(1024, 16, 24, "visible", 512, 16),
    "mae_huge": {**_vit(1280, 16, 32, "visible", 512, 16), "patch_size": 14},
    "mae_all_tokens_base": _vit(768, 12, 12, "all", 768, 16),
    "mae_all_tokens_large": _vit(1024, 16, 24, "all", 1024, 16),
}


def preset_values(name: object) -> dict[str, Any]:
    """The keys that a preset sets.

    Raises:
        ConfigError: For an unknown name, or what is no name; lists the valid ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"model.preset = '{name}' is unknown{nearest(str(name), list(PRESETS))}; valid: {', '.join(sorted(PRESETS))}"
        )
    return PRESETS[name]
