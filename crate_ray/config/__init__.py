"""Configuration of runs: frozen models, recipes and overrides, digests. Nothing of ours is imported here."""

from crate_ray.config.base import SCHEMA_VERSION, ConfigError, Frozen, nearest
from crate_ray.config.identity import compare_parts, digest, fingerprint, flatten, resume_parts, run_name
from crate_ray.config.load import apply_override, dump_yaml, load_model, load_run, read_yaml, recipe_names
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
from crate_ray.config.sweep import LARGER_IS_BETTER, LIVE_OBJECTIVES, Domain, SweepConfig

__all__ = [
    "LARGER_IS_BETTER",
    "LIVE_OBJECTIVES",
    "MAX_PERIOD",
    "PRESETS",
    "SCHEMA_VERSION",
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
    "StorageConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "apply_override",
    "compare_parts",
    "digest",
    "dump_yaml",
    "fingerprint",
    "flatten",
    "load_model",
    "load_run",
    "nearest",
    "preset_values",
    "read_yaml",
    "recipe_names",
    "resume_parts",
    "run_name",
    "whole_weights",
]
