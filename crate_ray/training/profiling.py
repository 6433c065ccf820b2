"""A torch profiler trace of some steps, into the run folder.

In: the first and the last step, as `--profile A:B` says. Out: `profile/steps_A-B.json.gz`, which chrome://tracing and
Perfetto open, the table of the operators that took longest beside it as text, and in the log. The trade-off: the
profiled steps are slower than others, and a trace is held in memory until it is written, so the range is bounded.
"""

import logging
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder

log = logging.getLogger(__name__)

MOST_STEPS = 100
"""Of one trace: a step of a base model is some thousand events, and a viewer gives up at some hundred megabytes."""
TOP_OPERATORS = 15


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps `first` to `last`, both traced; steps count from 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """Reads `A:B`.

        Raises:
            ConfigError: Not two step numbers in order, or more steps than a trace should hold.
        """
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        steps = cls(int(match[1]), int(match[2])) if match else None
        if steps is None or not 1 <= steps.first <= steps.last:
            raise ConfigError(
                f"--profile {text} is no range of steps; give the first and the last step to trace, counted from 1, as in 20:24"
            )
        if steps.last - steps.first >= MOST_STEPS:
            raise ConfigError(
                f"--profile {text} would trace {steps.last - steps.first + 1:,} steps, and no viewer opens that; "
                f"give at most {MOST_STEPS}, as in {steps.first}:{steps.first + 4}"
            )
        return steps

    def check(self, *, done: int, total: int) -> None:
        """Refuses steps that the run will not take.

        Args:
            done: Steps that it took already.
            total: Steps of the whole run.

        Raises:
            ConfigError: Says which steps are left.
        """
        if done >= total:
            raise ConfigError(f"--profile {self.first}:{self.last}: this run has taken all of its {total:,} steps")
        if self.first <= done or self.last > total:
            raise ConfigError(
                f"--profile {self.first}:{self.last} is not within the steps that this run has before it; "
                f"give a range within {done + 1}:{total}"
            )


class StepProfiler:
    """Traces its steps on one rank, which is rank 0: the others wait for it in their all-reduces.

    Args:
        steps: What to trace.
        folder: The run.
        device: Where the model computes.
    """

    def __init__(self, steps: ProfiledSteps, folder: RunFolder, *, device: torch.device) -> None:
        self._steps, self._folder, self._device = steps, folder, device
        self._trace: profile | None = None
        self._last_done = 0

    def step_begins(self, step: int) -> None:
        """Starts the trace before its first step."""
        if step != self._steps.first:
            return
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        self._trace = profile(activities=activities)
        self._trace.start()

    def step_done(self, step: int) -> bool:
        """Ends the trace after its last step, and says whether it did: writing takes a while."""
        if self._trace is None:
            return False
        self._last_done = step
        if step < self._steps.last:
            self._trace.step()  # marks the step in the trace
            return False
        self.close()
        return True

    def close(self) -> None:
        """Writes what was traced; less than was asked for where the run stops before the last step.

        A store that refuses costs the trace and not the run.
        """
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        trace.stop()
        name, table = f"steps_{self._steps.first}-{self._last_done}", self._table(trace)
        target = self._folder.path("profile", f"{name}.json.gz")
        log.info("profile of steps %d to %d: %s\n%s", self._steps.first, self._last_done, target, table)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch, "trace.json.gz")
                trace.export_chrome_trace(str(file))
                storage.write_atomic(target, file.read_bytes())
            storage.write_atomic(self._folder.path("profile", f"{name}.txt"), table + "\n")
        except OSError as error:
            log.warning("the profile is lost: %s", error)

    def _table(self, trace: profile) -> str:
        where = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        return str(trace.key_averages().table(sort_by=where, row_limit=TOP_OPERATORS, max_name_column_width=60))
