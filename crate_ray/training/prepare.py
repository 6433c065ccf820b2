"""From a configuration to a run that may start: paths made absolute, data found, identity settled.

Everything that can refuse a run refuses it here, before a cluster is touched.
"""

from typing import Any, Literal

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, digest, fingerprint, resume_parts, whole_weights
from crate_ray.data import load_index
from crate_ray.runs import RunFolder, find_run, open_run
from crate_ray.training.disk_space import check_disk_space
from crate_ray.training.first_weights import check_first_weights, pin_weights
from crate_ray.training.precision import resolve_precision


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration with local paths that hold in any working directory."""
    data, train = config.data, config.train
    paths: dict[str, Any] = {
        key: storage.absolute(url) for key in ("train", "eval", "test") if (url := getattr(data, key)) is not None
    }
    if data.mix is not None:
        paths["mix"] = tuple(part.model_copy(update={"train": storage.absolute(part.train)}) for part in data.mix)
    weights = {} if train.init_from is None else {"init_from": storage.absolute(train.init_from)}
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths),
            "train": train.model_copy(update=weights),
            "storage": config.storage.model_copy(update={"path": storage.absolute(config.storage.path)}),
        }
    )


def data_digest(config: RunConfig) -> str:
    """Digest of the training and validation shards: names, sizes and contents, never where they lie; of a mix, the weights."""
    source = config.data.source
    if isinstance(source, str):
        parts: dict[str, Any] = {"train": load_index(source).digest}
    else:
        weights = whole_weights([part.weight for part in source])
        parts = {"mix": [[load_index(part.train).digest, weight] for part, weight in zip(source, weights, strict=True)]}
    if config.data.eval is not None:
        parts["eval"] = load_index(config.data.eval).digest
    return digest(parts)


def record_datasets(config: RunConfig, folder: RunFolder) -> None:
    """Writes datasets.json: what of which split lies where, with a digest of its content. Written anew where data has moved."""
    urls = [*(("train", url) for url in config.data.train_urls), ("eval", config.data.eval), ("test", config.data.test)]
    wanted = [(split, url) for split, url in urls if url is not None]
    held = (folder.read_json("datasets.json") or {}).get("datasets", [])
    if [(entry["split"], entry["url"]) for entry in held] == wanted:
        return
    datasets = []
    for split, url in wanted:
        index = load_index(url)
        sizes = {"images": index.num_samples, "classes": index.num_classes}
        datasets.append({"split": split, "url": url, "digest": index.digest, **sizes})
    folder.write_json("datasets.json", {"datasets": datasets})


def check_labels(config: RunConfig) -> None:
    """Refuses to train a classifier on images without a label, or with one that it has no class for.

    Raises:
        ConfigError: Names the shards, the labels found and the number of classes.
    """
    num_classes = config.model.num_classes
    if config.task != "classify" or num_classes is None:
        return
    _check_same_classes(config)
    urls = {f"data.{key}": getattr(config.data, key) for key in ("train", "eval", "test")}
    urls |= {f"data.mix.{number}.train": part.train for number, part in enumerate(config.data.mix or ())}
    for key, url in urls.items():
        if url is None:
            continue
        labels = load_index(url).labels
        unlabelled = int((labels < 0).sum())
        if unlabelled:
            raise ConfigError(
                f"{key} = '{url}': {unlabelled:,} of {len(labels):,} images have no label, and task = classify needs one "
                "of each; give labelled shards, or set task to pretrain"
            )
        if labels.max() >= num_classes:
            raise ConfigError(
                f"{key} = '{url}' has the labels {labels.min()} to {labels.max()}, but model.num_classes = {num_classes} "
                f"takes 0 to {num_classes - 1}; set model.num_classes to {labels.max() + 1}, or give other shards"
            )


def _check_same_classes(config: RunConfig) -> None:
    """Refuses to train a classifier on data sets that do not have the same number of classes."""
    found = [(part.train, load_index(part.train).num_classes) for part in config.data.mix or ()]
    if len({number for _, number in found}) > 1:
        listed = ", ".join(f"'{url}' has {number}" for url, number in found)
        raise ConfigError(
            f"data.mix: {listed} classes, and task = classify needs data sets with the same classes; where they are the same, "
            "give all of them their number with `crate-ray data index URL --num-classes N`"
        )


def locate_run(config: RunConfig) -> RunFolder:
    """The folder that the run has or would have; reads the data's index and writes nothing.

    Args:
        config: With absolute paths.

    Raises:
        ConfigError: No such data or labels that do not fit, a name that another configuration has, or first weights that
            do not fit the model.
    """
    if config.data.test is not None:
        load_index(config.data.test)  # missed now, not after the training
    check_labels(config)
    config = pin_weights(config)
    folder = find_run(config, resume_parts(config, data_digest(config)))
    check_first_weights(config, folder)
    return folder


def prepare_run(
    config: RunConfig,
    *,
    device_type: str,
    kind: str = "train",
    study: str = "",
    parent_uid: str | None = None,
    stage: Literal["screen", "confirm"] | None = None,
    uri: str | None = None,
) -> tuple[RunConfig, RunFolder]:
    """Checks data and storage, and opens the run folder.

    Args:
        config: As loaded; relative paths are taken from the working directory.
        device_type: "cpu" or "cuda": decides what precision `auto` is.
        kind: See `runs.open_run`, as the arguments below.
        study: The study that the run belongs to.
        parent_uid: The run above it.
        stage: Of a trial.
        uri: The folder, where it is not storage.path/name.

    Returns:
        The configuration with absolute paths and the digest of its first weights, and the folder.

    Raises:
        ConfigError: No such data or labels that do not fit, storage that cannot be written or is too small, a name that
            another configuration has, or first weights that do not fit the model.
    """
    config = pin_weights(absolute_paths(config))
    check_labels(config)
    storage.check_writable(config.storage.path)
    precision = resolve_precision(config.train.precision, device_type)
    identity = fingerprint(config, data_digest(config), precision)
    found = find_run(config, identity["resume"]["parts"], uri=uri)
    check_first_weights(config, found)
    check_disk_space(config, found)
    folder = open_run(config, identity, kind=kind, study=study, parent_uid=parent_uid, stage=stage, uri=uri)
    record_datasets(config, folder)
    return config, folder
