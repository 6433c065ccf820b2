"""Where a number first stopped being one: a batch is run again, forward and backward, with hooks on every module.

In: a module and a function that runs a batch through it. Out: a sentence that names the layer and says whether its weights,
what goes in, what comes out, or a gradient was the first to hold NaN or infinity. Every hook waits for the device, so this
costs some steps' worth of time; it is done once for each row of skipped steps, never while all is well.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from crate_ray.training.sharded import local_part

_WRAPPERS = ("model.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Finding:
    """Something that is not finite.

    Attributes:
        phase: Of the step: 0 weights, 1 forward pass, 2 backward pass, 3 what ranks and micro-batches made together. What is
            found in an early one is the cause of what others find later.
        text: For a person.
    """

    phase: int
    text: str


def find_non_finite(module: nn.Module, run: Callable[[], object]) -> Finding | None:
    """The first thing of this rank that is not finite; None where all is.

    Args:
        module: Its sub-modules are watched. No control flow depends on what is found, so collectives inside stay in step.
        run: Runs a batch forward and backward; the gradients it leaves are those of the module's parameters.
    """
    search = _Search(module)
    search.look_at_weights()
    with search.hooked():
        run()
    search.look_at_gradients()
    return search.finding


class _Search:
    """Keeps the first finding; what comes later follows from it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.finding: Finding | None = None

    def look_at_weights(self) -> None:
        for name, parameter in self._module.named_parameters():
            self._note(not _is_finite(parameter), 0, f"weights of {_shown(name)} hold NaN or infinity")

    def look_at_gradients(self) -> None:
        """Gradients that are summed or averaged after their hooks; and a sum of squares that alone overflows."""
        squares = {
            n: local_part(p.grad).double().square().sum() for n, p in self._module.named_parameters() if p.grad is not None
        }
        for name, parameter in self._module.named_parameters():
            self._note(not _is_finite(parameter.grad), 3, f"the gradient of {_shown(name)} is not finite once it is summed")
        if squares and not torch.isfinite(torch.stack(list(squares.values())).sum().float()):
            largest = max(squares, key=lambda name: float(squares[name]))
            self._note(
                True, 3, f"the norm of the gradient overflows, by that of {_shown(largest)}, though every entry is finite"
            )

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        for name, module in self._module.named_modules():
            handles.append(module.register_forward_hook(partial(self._after_forward, name)))
            handles.append(module.register_full_backward_hook(partial(self._after_backward, name)))
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(partial(self._of_weight, name)))  # type: ignore[no-untyped-call]
        try:
            with warnings.catch_warnings():  # of layers that images go into: there is no gradient of those
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                warnings.filterwarnings(
                    "ignore", message="FSDP2-wrapped module .* returned a view tensor"
                )  # of a hook's making
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_forward(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        self._note(not _are_finite(inputs), 1, f"the input of {_shown(name)} is not finite in the forward pass")
        self._note(not _are_finite(output), 1, f"the output of {_shown(name)} is not finite, though its input is")

    def _after_backward(self, name: str, module: nn.Module, of_inputs: Any, of_outputs: Any) -> None:
        self._note(not _are_finite(of_outputs), 2, f"the gradient that reaches {_shown(name)} is not finite")
        self._note(
            not _are_finite(of_inputs),
            2,
            f"the gradient that leaves {_shown(name)} is not finite, though the one that reaches it is",
        )

    def _of_weight(self, name: str, gradient: Tensor) -> None:
        self._note(not _is_finite(gradient), 2, f"the gradient of {_shown(name)} is not finite")

    def _note(self, is_found: bool, phase: int, text: str) -> None:
        if is_found and self.finding is None:
            self.finding = Finding(phase, text)


def _are_finite(values: Any) -> bool:
    parts: Iterable[Any] = values if isinstance(values, tuple | list) else (values,)
    return all(_is_finite(part) for part in parts)


def _is_finite(value: Any) -> bool:
    """Whether a tensor of floats is; whatever else it may be counts as finite."""
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(local_part(value)).all())


def _shown(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper) if wrapper == "model." else name.replace(wrapper, "")
    return f"`{name}`" if name else "the loss"
