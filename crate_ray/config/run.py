"""One run, frozen: what to train, on what, how, and where it goes.

In: a recipe with overrides. Out: a RunConfig whose every key is resolved. The digests that
give a run its identity are in `identity`; this file only says what the keys mean.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from crate_ray.config.base import ConfigError, Frozen
from crate_ray.config.mix import MixPart, check_mix
from crate_ray.config.model import ModelConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Positive = Annotated[float, Field(gt=0)]


class DataConfig(Frozen):
    """Shards, their order, and what is done to an image."""

    train: str | None = Field(None, description="folder or URL of the training shards with their index")
    mix: tuple[MixPart, ...] | None = Field(
        None, description="instead of train: several, read in the ratio of their weights: [{train: URL, weight: 2.0}, ...]"
    )
    eval: str | None = Field(None, description="validation shards: evaluation, kNN and every choice read these")
    test: str | None = Field(None, description="test shards: read by `probe --test` and `compare` only")
    num_loaders: int = Field(2, ge=0, le=256, description="loader threads a worker; 0 decodes in the training thread")
    preprocess: Literal["ray_data"] | None = Field(
        None, description="ray_data: num_loaders actors a worker decode on any node with a free CPU, instead of its threads"
    )
    lanes: int = Field(64, ge=1, le=2**31 - 1, description="canonical lanes of the order")
    window: int = Field(2048, ge=1, le=2**31 - 1, description="samples a lane shuffles at a time")
    augment: Literal["none", "random_resized_crop"] = "random_resized_crop"
    crop_scale: tuple[float, float] = Field((0.2, 1.0), description="area range of the random crop, as a share of the image")
    flip: bool = Field(True, description="mirror half of the images when augmenting")
    mixup_alpha: Positive | None = Field(
        None, description="classify: blends the images of each pair, share from Beta(alpha, alpha)"
    )
    cutmix_alpha: Positive | None = Field(
        None, description="classify: swaps a box in each pair; with mixup_alpha too, a coin a step"
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="per channel, of pixels in [0, 1]")
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    max_pixels: int = Field(89_478_485, ge=1, description="larger images are refused from their header, before decoding")
    on_error: Literal["replace", "raise"] = "replace"
    max_replaced_fraction: float = Field(
        0.001, ge=0, le=1, description="the run stops when more samples than this had to be replaced"
    )
    loader_timeout_s: float = Field(300.0, gt=0, description="longest wait for a batch; then the late thread is named")
    cache_dir: str | None = Field(
        None, description="absolute folder on each node's own disk that keeps whole remote shards; null reads them by range"
    )
    cache_bytes: int = Field(64 << 30, ge=1, description="bytes of cache_dir, over all workers of a node; the oldest leave")

    @property
    def source(self) -> str | tuple[MixPart, ...]:
        """What is trained on: `train`, or the parts of `mix`."""
        if self.mix is not None:
            return self.mix
        assert self.train is not None
        return self.train

    @property
    def train_urls(self) -> tuple[str, ...]:
        """Every folder of training shards."""
        source = self.source
        return (source,) if isinstance(source, str) else tuple(part.train for part in source)

    @property
    def is_mixing(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup_alpha is not None or self.cutmix_alpha is not None

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "~")):
            raise ValueError("cache_dir is a folder on the disk of every node, so its path is absolute: /scratch/crate-ray")
        return value

    @field_validator("mix")
    @classmethod
    def _orderable(cls, value: tuple[MixPart, ...] | None) -> tuple[MixPart, ...] | None:
        if value is not None:
            check_mix(value)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.train is None) == (self.mix is None):
            raise ValueError(
                "give exactly one of data.train (a folder of shards) and data.mix (several: [{train: URL, weight: 1.0}, ...])"
            )
        return self

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("crop_scale needs 0 < smallest <= largest <= 1")
        return value


_DEFAULT_EPS = 1e-8


class OptimizerConfig(Frozen):
    """The optimizer; no decay on norms, biases and tokens, as published."""

    name: Literal["adamw", "lion", "muon"] | None = Field(
        None, description="null is adamw; muon: matrices inside the layers by Muon, the rest by AdamW, at one rate"
    )
    lr: float | None = Field(None, gt=0, description="peak learning rate")
    base_lr: float | None = Field(None, gt=0, description="peak learning rate for a batch of 256; scaled linearly")
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="of AdamW's moments; of lion its direction and momentum, there (0.9, 0.99) by default"
    )
    eps: float = Field(_DEFAULT_EPS, gt=0)
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="classify: a layer's learning rate is this times that of the layer above it"
    )

    @model_validator(mode="before")
    @classmethod
    def _published_betas(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "lion":
            return {"betas": (0.9, 0.99), **values}
        return values

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.name == "lion" and self.eps != _DEFAULT_EPS:
            raise ValueError(f"optimizer.eps = {self.eps:g} has no effect: lion divides by nothing; leave it out, or use adamw")
        return self

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError(
                "give exactly one of optimizer.lr (the peak itself) and optimizer.base_lr (times global_batch / 256)"
            )
        return self

    def peak_lr(self, global_batch: int) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr is not None else (self.base_lr or 0.0) * global_batch / 256


class ScheduleConfig(Frozen):
    """Linear warm-up from 0, then a half cosine to `final_lr_fraction` of the peak, or a constant with a linear cooldown."""

    warmup_steps: int | None = Field(None, ge=0)
    warmup_epochs: float | None = Field(None, ge=0)
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    cooldown_fraction: float | None = Field(
        None, gt=0, le=1, description="the peak is held, and this last share of the steps falls linearly; null: a half cosine"
    )

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("give schedule.warmup_steps or schedule.warmup_epochs, not both")
        return self


class TrainConfig(Frozen):
    """How long and how: the part that decides the numbers."""

    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    global_batch: int = Field(ge=1, description="images a step, over all workers")
    micro_batch: int | None = Field(
        None, ge=1, description="images a worker puts through at once; less than its share accumulates"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the device has it in hardware"
    )
    compile: bool = False
    clip_norm: float | None = Field(None, gt=0)
    deterministic: bool = Field(False, description="kernels whose sums have one order: two runs are equal bit for bit")
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay a step of an exponential moving average of the weights, kept beside them",
    )
    label_smoothing: float | None = Field(None, gt=0, lt=1, description="classify: share of the target spread over all classes")
    init_from: str | None = Field(
        None, description="weights to start from: a .safetensors or .pth file, or a run folder (its latest checkpoint)"
    )
    init_digest: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of these weights, which must agree; filled in when the run starts"
    )

    @model_validator(mode="after")
    def _whole_source(self) -> Self:
        if self.init_digest is not None and self.init_from is None:
            raise ValueError("train.init_digest belongs to the weights of train.init_from; give both, or leave it out")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self

    def num_steps(self, num_samples: int | None) -> int | None:
        """Optimizer steps of the run; epochs are counted in images seen, rounded up to a whole step.

        Args:
            num_samples: Images of the training data; None where they are not known yet: then epochs give None.
        """
        if self.steps is not None:
            return self.steps
        if num_samples is None:
            return None
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * num_samples / self.global_batch))


class EvalConfig(Frozen):
    """What is measured while training; never part of a run's identity."""

    every_steps: int | None = Field(None, ge=1, description="validation loss; always once more at the end")
    probe_every_steps: int | None = Field(None, ge=1, description="kNN on validation")
    max_images: int | None = Field(None, ge=1, description="validation images for the loss; all of them by default")
    knn_images: int = Field(2048, ge=1, description="labelled training images that kNN looks among")
    whitebox_every_steps: int | None = Field(
        500, ge=1, description="what each layer does to a frozen batch; also of the initialisation and at the end; null: never"
    )
    whitebox_images: int = Field(16, ge=1, le=256, description="validation images of that batch, spread over all")
    log_every_steps: int = Field(10, ge=1)
    use_ema: bool = Field(False, description="measure the average of train.ema in place of the weights, `probe` too")
    norms_every_steps: int | None = Field(500, ge=1, description="norms of gradient and update of each block; null: never")
    mask_ratios: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        None, min_length=1, description="pretrain: the final validation loss also at each of these mask ratios"
    )


BestMetric = Literal["eval/loss", "eval/top1", "eval/knn_top1"]


class CheckpointConfig(Frozen):
    """When a run is saved and how many savings are kept."""

    every_steps: int | None = Field(None, ge=1)
    every_minutes: float | None = Field(10.0, gt=0)
    keep_last: int = Field(2, ge=1)
    keep_best: int | None = Field(
        None, ge=1, description="so many more are kept, the best by best_metric; an evaluation that is among them is saved"
    )
    best_metric: BestMetric | None = Field(None, description="null: eval/loss of pretrain, eval/top1 of classify")
    wait: bool = Field(
        False, description="the step that saves waits until the checkpoint is whole; sweeps that copy trials need it"
    )
    stop_grace_s: float = Field(60.0, gt=0, description="seconds that a stop waits for the last checkpoint")


class WorkerRange(Frozen):
    """Elastic: as many workers as there is room for, within these bounds, while the run goes on."""

    min: int
    max: int


class ScaleConfig(Frozen):
    """Workers and devices; changing these continues the same run."""

    num_workers: int | WorkerRange = Field(
        1, description="a number, or {min: 1, max: 8}: goes on with fewer when a node is lost, grows when one comes back"
    )
    resize_check_s: float = Field(60.0, gt=0, description="with {min, max}: seconds between two looks for room to grow")
    use_gpu: bool | Literal["auto"] = "auto"
    cpus_per_worker: float = Field(1.0, gt=0)
    activation_checkpointing: bool = Field(
        False, description="layers keep their input and compute the rest again in the backward pass: less memory, more time"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="ddp: each worker holds the whole model; fsdp: a share of weights, gradients and optimizer state"
    )
    hybrid_shard: bool = Field(False, description="fsdp: shares lie inside a node, and nodes hold copies of each other")
    max_failures: int = Field(
        3, ge=0, description="failures that restart the workers, in a row without a new checkpoint, before the run is FAILED"
    )
    hang_timeout_s: float = Field(
        600.0,
        gt=0,
        description="a worker that makes no step for so long writes its stacks into hangs/ and ends; then as a failure",
    )
    node_wait_s: float | None = Field(
        None,
        gt=0,
        description="so long nodes are waited for that an autoscaler starts, even where it names none beforehand; null: 900 s "
        "where it does, and elsewhere what does not fit is refused",
    )
    peak_tflops: float | None = Field(
        None, gt=0, description="dense TFLOP/s of a worker's device, for MFU; null: as its vendor prints, where it is known"
    )

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        """Checked as a whole: pydantic would report each branch of the union."""
        given = value.model_dump() if isinstance(value, WorkerRange) else value
        bounds: list[Any] = [given.get("min"), given.get("max")] if isinstance(given, dict) and len(given) == 2 else [given]
        if not all(type(bound) is int and bound >= 1 for bound in bounds) or bounds != sorted(bounds):
            not_this = f", not {given}" if isinstance(given, dict) else ""
            raise ValueError(f"give a whole number of workers, 1 or more, or a range such as {{min: 1, max: 8}}{not_this}")
        return value

    @model_validator(mode="after")
    def _shards_to_lie_in_nodes(self) -> Self:
        if self.hybrid_shard and self.parallel != "fsdp":
            raise ValueError(
                f"scale.hybrid_shard says where shards lie, and scale.parallel = {self.parallel} has none; "
                "set scale.parallel: fsdp, or leave it out"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest workers that train: each has the largest share of the batch."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.min

    @property
    def max_workers(self) -> int:
        """The most workers that train; what is asked of the cluster."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.max

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return self.min_workers < self.max_workers


class HealthConfig(Frozen):
    """Steps whose loss or gradient is not finite are skipped; too many in a row end in a rollback."""

    max_skipped: int = Field(5, ge=1, description="skipped steps in a row before the run goes back to its last good checkpoint")
    max_rollbacks: int | None = Field(
        None, ge=0, description="rollbacks before the run is FAILED; null: 3, and none in a trial of a sweep"
    )
    lr_factor: float = Field(0.5, gt=0, le=1, description="after a rollback the learning rate is multiplied by this")
    lr_steps: int = Field(100, ge=0, description="for so many steps")
    spike_z: float = Field(
        6.0, gt=0, description="robust z-score from which a loss is reported as a spike; nothing is done about it"
    )


class StorageConfig(Frozen):
    """Where run folders live: a path, or a URL that pyarrow.fs opens."""

    path: str = "out"


class TrackingConfig(Frozen):
    """MLflow, a mirror of the run folder. None: sqlite beside the run folders."""

    uri: str | None = None
    experiment: str = "crate-mae/default"
    system_every_s: float | None = Field(
        10.0, ge=1, description="processors, memory, disk, network and GPUs of each node are sampled so often; null: never"
    )


class RunConfig(Frozen):
    """A whole run. `RunConfig.load(recipe_or_path, overrides)` makes one (see `config.load`)."""

    name: str | None = Field(None, pattern=NAME_PATTERN, description="default: <recipe>-<8 hex of the resume digest>")
    recipe: str = Field("custom", pattern=NAME_PATTERN)
    task: Literal["pretrain", "classify"] = "pretrain"
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: ScaleConfig = ScaleConfig()
    health: HealthConfig = HealthConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scale.max_workers > self.train.global_batch:
            key = "scale.num_workers" if isinstance(self.scale.num_workers, int) else "scale.num_workers.max"
            raise ValueError(
                f"{key} = {self.scale.max_workers} is more than train.global_batch = {self.train.global_batch}: "
                f"some workers would have no image; use at most {self.train.global_batch} workers"
            )
        if self.task == "pretrain":
            self._check_pretrain()
        elif self.model.num_classes is None:
            raise ValueError(
                "task = classify trains a classifier, and model.num_classes is not set; give the number of classes"
            )
        if self.data.is_mixing:
            check_pairs(self, *range(self.scale.min_workers, self.scale.max_workers + 1))
        self._check_mask_ratios()
        self._check_optimizer()
        self._check_best()
        return self

    @property
    def best_metric(self) -> BestMetric:
        """What `checkpoint.keep_best` judges by."""
        return self.checkpoint.best_metric or ("eval/loss" if self.task == "pretrain" else "eval/top1")

    def _check_best(self) -> None:
        if self.checkpoint.keep_best is None:
            if self.checkpoint.best_metric is not None:
                raise ValueError("checkpoint.best_metric has no effect without checkpoint.keep_best; set both, or neither")
            return
        if self.best_metric == "eval/top1" and self.task == "pretrain":
            raise ValueError(
                "checkpoint.best_metric = eval/top1 is measured of classifiers; task = pretrain has eval/loss and eval/knn_top1"
            )
        key = "probe_every_steps" if self.best_metric == "eval/knn_top1" else "every_steps"
        if self.data.eval is None or getattr(self.eval, key) is None:
            raise ValueError(
                f"checkpoint.keep_best = {self.checkpoint.keep_best} judges by {self.best_metric}, which is not measured: "
                f"set data.eval and eval.{key}, or leave checkpoint.keep_best out"
            )

    def _check_optimizer(self) -> None:
        if self.eval.use_ema and self.train.ema is None:
            raise ValueError("eval.use_ema needs train.ema, the decay of the average: set it (0.999, say), or leave it out")
        if self.optimizer.name == "muon" and self.model.parametrization == "mup":
            raise ValueError(
                "model.parametrization = mup scales the rates of sign-like updates (adamw, lion), and its rule for muon's "
                "orthogonal ones is not known here; use adamw or lion, or the standard parametrization"
            )

    def _check_mask_ratios(self) -> None:
        ratios = self.eval.mask_ratios or ()
        if ratios and self.task != "pretrain":
            raise ValueError("eval.mask_ratios hides patches, and task = classify hides none: leave it out, or pretrain")
        unusable = [f"{ratio:g}" for ratio in ratios if not 1 <= self.model.kept_at(ratio) < self.model.num_patches]
        if unusable:
            raise ValueError(
                f"eval.mask_ratios holds {', '.join(unusable)}, which hides none or all of {self.model.num_patches} patches; "
                "at least one must be kept and one masked"
            )

    def _check_pretrain(self) -> None:
        if self.model.num_classes is not None:
            raise ValueError(
                "model.num_classes is set, but task = pretrain trains a masked autoencoder; leave it out, or set task: classify"
            )
        of_classify = {
            "data.mixup_alpha": self.data.mixup_alpha,
            "data.cutmix_alpha": self.data.cutmix_alpha,
            "train.label_smoothing": self.train.label_smoothing,
            "optimizer.layer_decay": self.optimizer.layer_decay,
        }
        unused = [key for key, value in of_classify.items() if value is not None]
        if unused:
            raise ValueError(
                f"{', '.join(unused)} would have no effect with task = pretrain; leave out, or set task to classify"
            )

    @classmethod
    def load(cls, recipe_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> "RunConfig":
        """Reads a recipe by name, or a YAML file, and applies `a.b=c` overrides.

        Raises:
            ConfigError: Unknown recipe or key, or a value out of range.
        """
        from crate_ray.config.load import load_run

        return load_run(recipe_or_path, overrides)


def check_pairs(config: RunConfig, *num_workers: int) -> None:
    """Refuses batches that would tear apart the pairs (2j, 2j + 1) of rows that are mixed with each other.

    Args:
        config: A run that mixes.
        num_workers: Workers that share the global batch; each number that may come.

    Raises:
        ConfigError: Names the keys and the nearest values that are valid.
    """
    batch, micro_batch, whole = config.train.global_batch, config.train.micro_batch, 2 * math.lcm(*num_workers)
    problems = []
    if batch % whole:
        near = max(whole, batch - batch % whole)
        first, last = num_workers[0], num_workers[-1]
        needed = f"2 x {first} workers" if first == last else f"{whole}, which {first} to {last} workers need"
        problems.append(f"train.global_batch = {batch} is not a multiple of {needed}: use {near}")
    if micro_batch is not None and micro_batch % 2:
        problems.append(f"train.micro_batch = {micro_batch} is odd: use {micro_batch + 1}")
    if problems:
        raise ConfigError(
            "data.mixup_alpha and data.cutmix_alpha mix rows in pairs, so each worker and micro-batch needs whole pairs; "
            f"{'; '.join(problems)}; or leave both out"
        )
