"""Trials as lines of text: what varies, in a few words, and a table whose numbers are always whole.

In: the values of a trial and what it measured. Out: words and rich tables. The trade-off: what does not fit a narrow
terminal is left out by the word, with a mark where it was, so that no number is ever cut or broken over lines.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from crate_ray.config import Domain, SweepConfig

DEPTH, WIDTH = "model.encoder_depth", "model.width"
_WIDE = 100  # columns from which cells stand two apart
_SHORTEST_ID = 12  # an arm's first letters and the digits
_SHORTEST_SHAPE = 7
_LEAST_NEEDED = ("img/s", "params", "kNN", "probe")  # on a narrow terminal, the first to go first
_SHORT = {
    DEPTH: "d",
    WIDTH: "w",
    "model.decoder_depth": "dd",
    "model.decoder_width": "dw",
    "model.num_heads": "h",
    "model.patch_size": "p",
    "model.mask_ratio": "m",
    "model.ista_step_size": "e",
    "model.ista_lambda": "l",
    "optimizer.lr": "lr",
    "optimizer.base_lr": "blr",
    "optimizer.weight_decay": "wd",
    "train.global_batch": "b",
    "train.steps": "n",
}
_STATES = {
    "RUNNING": ("running", "bold"),
    "FINISHED": ("done", "green"),
    "STOPPED": ("stopped", "yellow"),
    "INFEASIBLE": ("infeasible", "magenta"),
    "FAILED": ("failed", "red"),
    "KILLED": ("killed", "red"),
}


@dataclass(frozen=True)
class TrialLine:
    """A trial as the table shows it; None where nothing was measured. Accuracies are shares, `params_m` millions."""

    id: str
    shape: str
    state: str
    params_m: float | None = None
    step: int = 0
    total_steps: int | None = None
    eval_loss: float | None = None
    knn_top1: float | None = None
    probe_top1: float | None = None
    images_per_s: float | None = None


def varying_keys(sweep: SweepConfig) -> tuple[str, ...]:
    """The keys that tell the trials of a sweep apart; what merely follows from another key only where it is a size."""
    spaces = [*(sweep.domains_of(arm) for arm in sweep.arms or ("",)), sweep.scheduler.perturb]
    return tuple(dict.fromkeys(key for space in spaces for key, domain in space.items() if _varies(key, domain)))


def _varies(key: str, domain: Domain) -> bool:
    if domain.of is not None:
        return key in (DEPTH, WIDTH)
    return len(domain.grid or domain.choice or (0, 1)) > 1


def shape_of(values: Mapping[str, Any], keys: Sequence[str], *, seed: int | None = None) -> str:
    """What tells a trial apart: `12x384 m.75 e.1 lr3e-4`, the seed last where one is given."""
    shown = [key for key in keys if key in values]
    words = []
    if DEPTH in shown and WIDTH in shown:
        words.append(f"{values[DEPTH]}x{values[WIDTH]}")
        shown = [key for key in shown if key not in (DEPTH, WIDTH)]
    words += [_word(key, values[key]) for key in shown]
    if seed is not None:
        words.append(f"s{seed}")
    return " ".join(words)


def _word(key: str, value: Any) -> str:
    if key in _SHORT:
        return f"{_SHORT[key]}{compact(value)}"
    return str(value) if isinstance(value, str) else f"{key.rpartition('.')[2]}={compact(value)}"


def compact(value: Any) -> str:
    """A value in as few characters as say it: .75, 3e-4, 1.5, on, 64."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(compact(item) for item in value)
    if not isinstance(value, float) or value == 0 or value.is_integer():
        return f"{value:.0f}" if isinstance(value, float) else str(value)
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4g}"


def fit_words(text: str, width: int) -> str:
    """The text, or as many whole words of it as fit, and a mark for the rest."""
    if len(text) <= width:
        return text
    kept = ""
    for word in text.split(" "):
        longer = f"{kept} {word}".strip()
        if len(longer) + 2 > width:
            break
        kept = longer
    return f"{kept} …".strip()


def fit_id(trial: str, width: int) -> str:
    """A trial's id; a long arm gives way, never the digits that tell the trials of an arm apart."""
    if len(trial) <= width:
        return trial
    arm, _, digits = trial.rpartition("-")
    return f"{arm[: max(width - len(digits) - 2, 0)]}…-{digits}"


def fit_parts(parts: Iterable[str], width: int, *, gap: str = "  ") -> list[str]:
    """Parts side by side, on a new line where the next does not fit whole; a part longer than a line loses words."""
    lines: list[str] = []
    for part in (fit_words(text, width) for text in parts):
        if lines and len(lines[-1]) + len(gap) + len(part) <= width:
            lines[-1] += gap + part
        else:
            lines.append(part)
    return lines


def trial_table(lines: Sequence[TrialLine], width: int) -> Table:
    """The table of one or more trials, at most `width` columns wide.

    Accuracies that no trial has take no room; a terminal narrower than 80 columns sees fewer numbers.
    """
    numbers = {
        "params": [_number(line.params_m, "{:.2f}M") for line in lines],
        "step": [f"{line.step}/{line.total_steps}" if line.total_steps else str(line.step) for line in lines],
        "eval": [_number(line.eval_loss, "{:.4f}") for line in lines],
        "kNN": [_number(line.knn_top1, "{:.1%}") for line in lines],
        "probe": [_number(line.probe_top1, "{:.1%}") for line in lines],
        "img/s": [_number(line.images_per_s, "{:.0f}") for line in lines],
    }
    states = [Text(*_STATES.get(line.state, (line.state.lower(), ""))) for line in lines]
    gap = 2 if width >= _WIDE else 1
    others = max(len(state) for state in states) + 2 * gap
    unneeded = [name for name in ("kNN", "probe") if set(numbers[name]) == {"-"}]
    for name in (*unneeded, *_LEAST_NEEDED):
        if name in unneeded or width - others - _width(numbers, gap) < _SHORTEST_ID + _SHORTEST_SHAPE:
            numbers.pop(name, None)
    room = width - others - _width(numbers, gap)
    shape_width = max(len(line.shape) for line in lines)
    ids = [fit_id(line.id, max(room - shape_width, _SHORTEST_ID)) for line in lines]
    shapes = [fit_words(line.shape, max(room - max(map(len, ids)), 1)) for line in lines]
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for name in ("trial", "shape", *numbers, "state"):
        table.add_column(name, no_wrap=True, justify="right" if name in numbers else "left")
    for index, (trial, shape, state) in enumerate(zip(ids, shapes, states, strict=True)):
        table.add_row(Text(trial), Text(shape), *(cells[index] for cells in numbers.values()), state)
    return table


def _width(columns: Mapping[str, Sequence[str]], gap: int) -> int:
    return sum(max(map(len, (name, *cells))) + gap for name, cells in columns.items())


def state_word(state: str) -> str:
    """A state as the screens call it."""
    return _STATES.get(state, (state.lower(), ""))[0]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
