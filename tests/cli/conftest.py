import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from crate_ray.cli.main import main
from crate_ray.config import RunConfig, fingerprint
from crate_ray.runs import RecordWriter, RunFolder, State, Status, open_run, write_status


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Runs `crate-ray ARGUMENTS` in this process, as the console script does."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["crate-ray", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return Outcome(int(end.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Makes run folders below `tmp_path / "out"` as a driver leaves them."""

    def make(name: str, state: State | None = "FINISHED", *, beat_s_ago: float = 0.0, **values: float) -> RunFolder:
        overrides = [f"storage.path={tmp_path / 'out'}", f"name={name}"]
        config = RunConfig.load("digits_crate_mae", overrides)
        folder = open_run(config, fingerprint(config, "0" * 64, "float32"))
        if values:
            writer = RecordWriter(folder, 1)
            writer.write(20, {key.replace("__", "/"): value for key, value in values.items()})
            writer.close()
        if state is not None:
            seen = time.time() - beat_s_ago
            write_status(folder, Status(state, 1, seen - 90, seen, None if state == "RUNNING" else seen))
        return folder

    return make
