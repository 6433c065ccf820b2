"""Which checkpoint of which run is judged, on what, by which protocols.

In: a run folder and a request. Out: a Subject, or a refusal before anything is computed. A request is plain values, so that it
travels to another node as it is.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from crate_ray.config import ConfigError, RunConfig, digest
from crate_ray.data import load_source
from crate_ray.evaluation.protocols import ProtocolName
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.runs import RunFolder, is_finished
from crate_ray.training.checkpoint import Checkpoint, latest_checkpoint, list_checkpoints
from crate_ray.training.ema import EMA_FILE, weights_file
from crate_ray.training.precision import choose_device
from crate_ray.training.probes.splits import OtherData, Split


@dataclass(frozen=True)
class ProbeRequest:
    """What is asked of one or more runs.

    Attributes:
        split: Judged on; test for final numbers alone.
        protocols: By which frozen features are judged; a classifier has one of its own.
        few_labels: Numbers of labels a class beside those of the house protocol.
        step: Of the checkpoint; None for the last one of a finished run.
        use_ema: The average of the weights, or not; None as the run's evaluation does, `eval.use_ema`.
        data: Shards in the place of the run's own.
    """

    split: Split = "validation"
    protocols: tuple[ProtocolName, ...] = ("house", "label-free")
    few_labels: tuple[int, ...] = ()
    step: int | None = None
    use_ema: bool | None = None
    data: OtherData | None = None


@dataclass(frozen=True)
class Subject:
    """A checkpoint under judgement.

    Attributes:
        folder: Of the run.
        config: Of the run, with the shards that are judged on.
        checkpoint: Of the run.
        weights: The file of the checkpoint that is judged.
        request: What is asked.
        is_end: Whether it is the last state of a finished run, whose numbers are final.
    """

    folder: RunFolder
    config: RunConfig
    checkpoint: Checkpoint
    weights: str
    request: ProbeRequest
    is_end: bool

    @property
    def is_ema(self) -> bool:
        """Whether the average of the weights is judged."""
        return self.weights == EMA_FILE

    @property
    def suffix(self) -> str:
        """What the files of this judgement are called by: `test`, `validation_cifar10`, `validation_step_00000100`."""
        data = () if self.request.data is None else (self.request.data.name,)
        step = () if self.is_end else (f"step_{self.checkpoint.step:08d}",)
        return "_".join((self.request.split, *data, *step))

    @cached_property
    def data_digest(self) -> str:
        """Of the shards that are fitted, chosen and judged on."""
        data = self.config.data
        sources = {"train": data.source, "validation": data.eval, "test": data.test if self.request.split == "test" else None}
        return digest({split: load_source(source).digest for split, source in sources.items() if source is not None})

    def build(self, *, trained: bool) -> MaskedAutoencoder | Classifier:
        """The model with the checkpoint's weights, or its control, on its device."""
        model = untrained(self.config)
        if trained:
            model.load_state_dict(self.checkpoint.read(self.weights))
        return model


def find_subject(folder: RunFolder, request: ProbeRequest) -> Subject:
    """The checkpoint that a request is about.

    Raises:
        ConfigError: The run is not finished, or has no checkpoint of that step, no average, or no such data.
    """
    config = folder.read_config()
    last = latest_checkpoint(folder)
    checkpoint = finished_checkpoint(folder) if request.step is None else _checkpoint_of(folder, request.step)
    is_end = is_finished(folder) and last is not None and checkpoint.step == last.step
    weights = weights_file(config, checkpoint, use_ema=request.use_ema)
    if request.data is not None:
        config = request.data.in_place_of(config)
    return Subject(folder, config, checkpoint, weights, request, is_end)


def finished_checkpoint(folder: RunFolder) -> Checkpoint:
    """The last checkpoint of a run that has come to its end.

    Raises:
        ConfigError: The run is not finished.
    """
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None or not is_finished(folder):
        there = [] if checkpoint is None else [f"; or judge a checkpoint of it: --step {checkpoint.step}"]
        raise ConfigError(f"run '{folder.name}' is not finished; train it to its end first, then probe it{''.join(there)}")
    return checkpoint


def _checkpoint_of(folder: RunFolder, step: int) -> Checkpoint:
    checkpoints = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(folder)}
    if step not in checkpoints:
        there = f"it has {', '.join(map(str, checkpoints))}" if checkpoints else "it has none"
        raise ConfigError(
            f"run '{folder.name}' has no checkpoint of step {step}; {there} (checkpoint.keep_last and .keep_best decide)"
        )
    return checkpoints[step]


def untrained(config: RunConfig) -> MaskedAutoencoder | Classifier:
    """The model of the run's seed before any training, that of `train.init_from` included."""
    torch.manual_seed(config.train.seed)
    return create_model(config.model).to(choose_device("auto" if config.scale.use_gpu else False, 0))
