"""One run through Ray Train, from the driver's side.

In: a RunConfig. Out: a run folder with its end written down. `fit()` runs in a thread; the main thread
owns the signals, the lease and the caller's callback. A stop travels through RunLine to the loop,
which writes a checkpoint and returns; only when that takes longer than `stop_grace_s` is the group torn
down. Final numbers come from rank 0's records, never from what fit() returns.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from types import FrameType
from typing import Any, Self

from crate_ray import storage
from crate_ray.config import RunConfig
from crate_ray.launch.cluster import capacity, check_preprocessing, connect, resolve_scale, worker_need
from crate_ray.runs import Lease, LeaseLostError, RunFolder, State, is_finished
from crate_ray.training.prepare import absolute_paths, locate_run, prepare_run
from crate_ray.training.profiling import ProfiledSteps

POLL_S = 0.2
EXIT_GRACE_S = 15.0  # for the last report and the teardown of workers, after the checkpoint


@dataclass(frozen=True)
class RunOutcome:
    """How a run stands after `launch_training`; `signal` is the one that stopped it, if any."""

    folder: RunFolder
    config: RunConfig
    state: State
    reason: str | None = None
    was_finished: bool = False
    signal: int | None = None


def launch_training(
    config: RunConfig,
    *,
    kind: str = "train",
    study: str = "",
    parent_uid: str | None = None,
    on_start: Callable[[RunFolder, RunConfig], None] = lambda folder, config: None,
    on_poll: Callable[[], None] = lambda: None,
    on_stop: Callable[[int], None] = lambda number: None,
    profiled: ProfiledSteps | None = None,
) -> RunOutcome:
    """Trains one run to its end, or until SIGINT or SIGTERM; resumes what is there.

    Args:
        config: As loaded.
        kind: See `runs.open_run`.
        study: See `runs.open_run`.
        parent_uid: See `runs.open_run`.
        on_start: Called once, when the folder is taken and before workers start.
        on_poll: Called several times a second from the main thread; must return soon.
        on_stop: Called once with the signal, when a stop has been passed on to the workers.
        profiled: Steps that rank 0 traces into the folder.

    Raises:
        ConfigError: The run cannot start; nothing was written but a new, empty folder.
        LeaseLostError: Another driver took the run over.
    """
    from crate_ray.launch.autoscaler import seat_coordinator

    config = absolute_paths(config)
    folder = locate_run(config)
    if is_finished(folder):
        return RunOutcome(folder, config, "FINISHED", was_finished=True)
    Lease.check_free(folder)  # what refuses the run without a cluster refuses it before one is started
    connect()
    config = config.model_copy(update={"scale": resolve_scale(config.scale)})
    check_preprocessing(config)
    storage.check_writable(config.storage.path)
    if capacity(config.scale).may_grow:
        seat_coordinator()
    with StopSignals() as signals:
        lease = Lease.take(folder)
        with failure_written(lease):
            device_type = "cuda" if config.scale.use_gpu else "cpu"
            config, folder = prepare_run(config, device_type=device_type, kind=kind, study=study, parent_uid=parent_uid)
            on_start(folder, config)
            state, reason = _run(
                Fit(config, folder, lease.attempt, profiled=profiled), config, lease, signals, on_poll, on_stop
            )
        lease.end(state, reason)
    on_poll()
    return RunOutcome(folder, config, state, reason, signal=signals.received)


@contextmanager
def failure_written(lease: Lease) -> Iterator[None]:
    """Writes down what ends a driver, and gives its folder back; one whose lease was lost leaves it to the other."""
    try:
        yield
    except LeaseLostError:
        raise
    except BaseException as error:
        lease.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", f"driver: {type(error).__name__}: {error}")
        raise


def _run(
    fit: "Fit",
    config: RunConfig,
    lease: Lease,
    signals: "StopSignals",
    on_poll: Callable[[], None],
    on_stop: Callable[[int], None],
) -> tuple[State, str | None]:
    """Fits, and leaves no worker behind when the driver itself fails."""
    try:
        return _follow(fit, config, lease, signals, on_poll, on_stop)
    except BaseException:
        fit.abort()
        raise


def _follow(
    fit: "Fit",
    config: RunConfig,
    lease: Lease,
    signals: "StopSignals",
    on_poll: Callable[[], None],
    on_stop: Callable[[int], None],
) -> tuple[State, str | None]:
    """Waits for the fit, passing a stop on to the workers."""
    from crate_ray.launch.waiting import NodeWatch

    watch, grace_s = NodeWatch(config.scale), config.checkpoint.stop_grace_s
    deadline: float | None = None
    while fit.is_running():
        fit.wait(POLL_S)
        lease.beat()
        on_poll()
        given_up = watch.look()
        if given_up is not None and signals.received is None:
            fit.tear_down()
            return "FAILED", given_up
        if signals.received is not None:
            fit.stop()
            if deadline is None:
                deadline = time.monotonic() + grace_s + EXIT_GRACE_S
                on_stop(signals.received)
        if deadline is not None and time.monotonic() > deadline:
            fit.abort()
            return "KILLED", f"{signals.name}; no checkpoint within {grace_s:.0f} s, the run goes on from the one before"
    state, reason = fit.end()
    if fit.error is not None and signals.received is not None:
        return "KILLED", f"{signals.name}; the run goes on from its newest checkpoint ({reason})"
    if state == "KILLED":
        cause = signals.name if signals.received is not None else "the workers lost the driver"
        reason = f"{cause}; a checkpoint was written"
    return state, reason


class StopSignals:
    """Owns SIGINT and SIGTERM while a run is on; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """Of the signal, as `kill -l` spells it; SIGTERM while none has come."""
        return signal.Signals(self.received or signal.SIGTERM).name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class Fit:
    """A TorchTrainer.fit() in a thread.

    Args:
        config: Resolved.
        folder: Prepared and leased.
        attempt: Number of this start of the run.
        is_followed: Whether rank 0 waits at each evaluation until `release`; see `next_event`.
        profiled: Steps that rank 0 traces.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        attempt: int,
        *,
        is_followed: bool = False,
        profiled: ProfiledSteps | None = None,
    ) -> None:
        from crate_ray.launch.run_line import open_line
        from crate_ray.launch.worker import train_worker

        self._line = open_line()
        payload = {
            "config": config.model_dump(mode="json"),
            "folder": folder.uri,
            "attempt": attempt,
            "line": self._line,
            "is_followed": is_followed,
            "profile": profiled and astuple(profiled),
        }
        # Ray would resume from its own list of checkpoints; ours is the manifests.
        storage.delete(folder.path("checkpoint_manager_snapshot.json"))
        self._trainer = _trainer(config, folder, train_worker, payload)
        self._result: dict[str, Any] | None = None
        self._awaited: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001  handed to the main thread
            self.error = error

    def is_running(self) -> bool:
        """Whether the fit has not returned yet."""
        return self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        """Waits at most this long."""
        self._thread.join(timeout_s)

    def next_event(self, timeout_s: float) -> dict[str, Any] | None:
        """What rank 0 of a followed run says next: `placement_group`, or `step` and `values`; None when nothing came."""
        import ray

        self._awaited = self._awaited or self._line.next_event.remote()
        ready, _ = ray.wait([self._awaited], timeout=timeout_s)
        if not ready:
            return None
        event: dict[str, Any] = ray.get(self._awaited)
        self._awaited = None
        return event

    def release(self) -> None:
        """Lets rank 0 go on after an evaluation."""
        self._line.release.remote()

    def stop(self) -> None:
        """Asks the workers for a checkpoint and their return."""
        self._line.stop.remote()

    def abort(self) -> None:
        """Leaves the cluster; Ray ends this driver's actors."""
        import ray

        ray.shutdown()

    def tear_down(self) -> None:
        """Leaves nothing of the fit behind while this process stays in the cluster: controller, workers, group and line."""
        import ray

        from crate_ray.launch.controller import ABORT_S, end_controller

        try:
            if self.is_running():
                controller = ray.get(self._line.controller.remote(), timeout=EXIT_GRACE_S)
                if controller is not None:
                    end_controller(*controller)
                    self.wait(ABORT_S)
        finally:
            ray.kill(self._line)

    @property
    def diverged(self) -> bool:
        """Whether the loss was no number any more."""
        return self._result is not None and bool(self._result["diverged"])

    def end(self) -> tuple[State, str | None]:
        """State and reason, from what rank 0 returned or from the error."""
        if self.error is not None:
            from crate_ray.launch.causes import sentence_of

            return "FAILED", sentence_of(self.error)
        if self._result is None:
            return "FAILED", "rank 0 returned nothing"
        return self._result["state"], self._result["reason"]


def _trainer(config: RunConfig, folder: RunFolder, worker: Callable[..., Any], payload: dict[str, Any]) -> Any:
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train.v2.api.config import RunConfig as RayRunConfig

    from crate_ray.launch.controller import ControllerHandle
    from crate_ray.launch.policies import ElasticPolicy, PolicedTrainer, RestartPolicy, newest_step, stop_wished

    store, path = storage.open_store(folder.uri)
    scale = config.scale
    scaling = ScalingConfig(
        num_workers=(scale.min_workers, scale.max_workers) if scale.is_elastic else scale.max_workers,
        use_gpu=bool(scale.use_gpu),
        resources_per_worker=worker_need(scale),
        elastic_resize_monitor_interval_s=scale.resize_check_s,
    )
    failure = FailureConfig(max_failures=scale.max_failures)
    grace_s = config.checkpoint.stop_grace_s
    return PolicedTrainer(
        worker,
        failure_policy=RestartPolicy(failure, partial(newest_step, folder.uri), partial(stop_wished, payload["line"])),
        scaling_policy=ElasticPolicy(scaling, payload["line"], grace_s) if scale.is_elastic else None,
        train_loop_config=payload,
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if scale.use_gpu else "gloo"),
        run_config=RayRunConfig(
            name=folder.name,
            storage_path=path.rsplit("/", 1)[0],
            storage_filesystem=None if folder.is_local else store,
            callbacks=[ControllerHandle(payload["line"])],  # type: ignore[list-item]
            failure_config=failure,
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {"RAY_ADDRESS": connect()}},
        ),
    )
