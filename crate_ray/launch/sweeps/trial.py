"""A trial of a sweep as Ray Tune sees it: the class API, in an actor that is used for one trial after another.

In: Tune's configuration of a trial (see `TrialSpec`). Out: a result at each evaluation, and a run folder as of `train`. Nothing
starts before the first `step`, because only by then it is known whether Tune restores the trial from a checkpoint.
"""

from typing import Any

from ray import tune

from crate_ray.launch.sweeps.generations import Pointer
from crate_ray.launch.sweeps.trial_session import TrialSession, TrialSpec


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """One worker: the loop runs in this actor. Several: this actor follows a TorchTrainer."""

    def setup(self, config: dict[str, Any]) -> None:
        """See tune.Trainable."""
        self._given = config
        self._pointer: Pointer | None = None
        self._session: TrialSession | None = None

    def step(self) -> dict[str, Any]:
        """Trains to the next evaluation; a flat result, `done` with the last."""
        if self._session is None:
            self._session = TrialSession(TrialSpec.parse(self._given), self._pointer)
        return self._session.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Leaves a pointer to the trial's newest checkpoint, which is kept for who copies it."""
        assert self._session is not None, "Tune saves trials that have reported"
        self._session.pointer.write(checkpoint_dir)

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Goes on from a pointer: of this trial, or of another one, whose state is copied."""
        self._close("restored from a checkpoint")
        self._pointer = Pointer.read(checkpoint_dir)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Makes room for the next trial.

        Raises:
            RuntimeError: The training of the last one hangs; the actor is of no more use, and Tune starts another one.
        """
        if not self._close("paused"):
            raise RuntimeError("the training of the last trial in this process does not end")
        self.setup(new_config)
        return True

    def cleanup(self) -> None:
        """Ends what runs, with a checkpoint."""
        self._close("ended with the sweep")

    def _close(self, reason: str) -> bool:
        session, self._session = self._session, None
        return session is None or session.close(reason=reason)
