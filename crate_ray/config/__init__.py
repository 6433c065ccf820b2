"""Configuration of runs: frozen models, recipes and overrides, digests. Nothing of ours is imported here."""

from crate_ray.config.base import SCHEMA_VERSION, ConfigError, Frozen, nearest
from crate_ray.config.domain import Domain, dependence_order
from crate_ray.config.identity import compare_parts, digest, fingerprint, flatten, resume_parts, run_name
from crate_ray.config.load import apply_override, dump_yaml, load_model, load_run, read_recipe, read_yaml, recipe_names, set_key
from crate_ray.config.load_sweep import dump_sweep, load_sweep
from crate_ray.config.mix import MAX_PERIOD, MixPart, whole_weights
from crate_ray.config.model import PRESETS, ModelConfig, preset_values
from crate_ray.config.run import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RunConfig,
    ScaleConfig,
    ScheduleConfig,
    StorageConfig,
    TrackingConfig,
    TrainConfig,
)
from crate_ray.config.sweep import (
    LARGER_IS_BETTER,
    LIVE_OBJECTIVES,
    LOSS_TARGET,
    Arm,
    SchedulerConfig,
    Stage,
    SweepConfig,
    is_exploratory,
    order_key,
)

__all__ = [
    "LARGER_IS_BETTER",
    "LIVE_OBJECTIVES",
    "LOSS_TARGET",
    "MAX_PERIOD",
    "PRESETS",
    "SCHEMA_VERSION",
    "Arm",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "Domain",
    "EvalConfig",
    "Frozen",
    "MixPart",
    "ModelConfig",
    "OptimizerConfig",
    "RunConfig",
    "ScaleConfig",
    "ScheduleConfig",
    "SchedulerConfig",
    "Stage",
    "StorageConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "apply_override",
    "compare_parts",
    "dependence_order",
    "digest",
    "dump_sweep",
    "dump_yaml",
    "fingerprint",
    "flatten",
    "is_exploratory",
    "load_model",
    "load_run",
    "load_sweep",
    "nearest",
    "order_key",
    "preset_values",
    "read_recipe",
    "read_yaml",
    "recipe_names",
    "resume_parts",
    "run_name",
    "set_key",
    "whole_weights",
]
