"""What another draw of judged images would change, the trained models held fixed.

In: for each run how many rows of every source image it answered right. Out: the interval of a difference over source images.
It stands apart from the interval over seeds: one is the luck of the test set, the other the luck of training.

Shapes: S source images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crate_ray.analysis.statistics import source_interval
from crate_ray.runs.rows import Estimate

Answers = Mapping[str, Mapping[str, Any]]
"""By run_uid: the content of a run's answers file, `sources` by name, their `rows`, and `correct` rows by metric."""
Pairs = tuple[tuple[str, str], ...]
"""run_uids of first and second, one pair a seed."""


def image_noise(pairs: Pairs, answers: Answers, metric: str) -> Estimate | None:
    """The difference of the seeds' means with its 95% interval over source images.

    None where a run's answers are not at hand, or damaged, or of other images, or of a single source.
    """
    try:
        return _noise(pairs, answers, metric)
    except (AttributeError, KeyError, TypeError, ValueError):  # a file without these keys, or of unequal lengths
        return None


def _noise(pairs: Pairs, answers: Answers, metric: str) -> Estimate | None:
    bodies = [(sign, answers.get(uid)) for pair in pairs for sign, uid in zip((1, -1), pair, strict=True)]
    reference = bodies[0][1] if bodies else None
    if reference is None or len(reference["sources"]) < 2:
        return None
    signed: list[NDArray[np.float64]] = []
    for sign, body in bodies:
        correct_S = _correct(body, reference, metric)
        if correct_S is None:
            return None
        signed.append(sign * correct_S)
    total_S = np.sum(signed, axis=0) / len(pairs)
    return source_interval(list(zip(total_S.tolist(), reference["rows"], strict=True)))


def _correct(body: Mapping[str, Any] | None, reference: Mapping[str, Any], metric: str) -> NDArray[np.float64] | None:
    """In the reference's order of sources; None where the sources or their rows are others."""
    correct: Sequence[float] | None = (body or {}).get("correct", {}).get(metric)
    if body is None or correct is None:
        return None
    if body["sources"] == reference["sources"]:
        return np.asarray(correct, dtype=np.float64) if body["rows"] == reference["rows"] else None
    held = {name: (rows, right) for name, rows, right in zip(body["sources"], body["rows"], correct, strict=True)}
    wanted: Sequence[tuple[str, int]] = list(zip(reference["sources"], reference["rows"], strict=True))
    if len(held) != len(wanted) or any(held.get(name, (None,))[0] != rows for name, rows in wanted):
        return None
    return np.asarray([held[name][1] for name, _ in wanted], dtype=np.float64)
