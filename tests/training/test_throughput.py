"""Data wait and the advice on loader threads: by arithmetic, and with real readers before slow steps and slow sources."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from crate_ray.config import RunConfig
from crate_ray.data import build_index, open_reader
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.throughput import (
    WARMUP_STEPS,
    WATCHED_STEPS,
    LoaderWatch,
    Throughput,
    Window,
    enough_loaders,
    largest_of_ranks,
)

LoadTiny = Callable[..., RunConfig]
CPU = torch.device("cpu")
LATENCY_S = 0.03


@pytest.fixture
def slow_source(shards: Path, tmp_path: Path) -> Iterator[str]:
    """The training shards behind a web server that needs 30 ms an image, however many it is asked for at once."""
    files = {f"/{path.name}": path.read_bytes() for path in (shards / "train").glob("*.tar")}
    is_slow = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            data, asked = files[self.path], re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            part = data[int(asked[1]) : int(asked[2]) + 1] if asked else data
            if is_slow.is_set() and self.command == "GET":
                time.sleep(LATENCY_S)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(data)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    serving.start()
    names = sorted(files)
    pattern = names[0] if len(names) == 1 else re.sub(r"\d+\.tar", f"{{{names[0][-10:-4]}..{names[-1][-10:-4]}}}.tar", names[0])
    try:
        build_index(f"http://127.0.0.1:{server.server_port}{pattern}", out=str(tmp_path / "index"))
        is_slow.set()
        yield str(tmp_path / "index")
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


def drive(url: str, *, num_loaders: int, step_s: float, batch: int = 4, steps: int = WARMUP_STEPS + WATCHED_STEPS):
    """The wait fraction after the warm-up, and what is said, of steps that only take time."""
    throughput, watch = Throughput(batch, CPU), LoaderWatch(num_loaders=num_loaders, images_per_step=batch)
    seen, said = Window(0, 0.0, 0.0), []
    with open_reader(url, global_batch=batch, image_size=16, num_loaders=num_loaders) as reader:
        for step in range(1, steps + 1):
            with throughput.waiting():
                next(reader)
            time.sleep(step_s)
            throughput.step_done()
            window = throughput.window()
            said += [text for text in [watch.look(window)] if text]
            if step > WARMUP_STEPS:
                seen = Window(seen.steps + 1, seen.seconds + window.seconds, seen.wait_s + window.wait_s)
    return seen.wait_fraction, said


def advised(text: str) -> int:
    found = re.search(r"data\.num_loaders=(\d+) would be enough", text)
    assert found is not None
    return int(found[1])


@pytest.mark.slow
def test_a_device_slower_than_the_loader_waits_for_less_than_two_percent_of_the_time(shards: Path) -> None:
    fraction, said = drive(str(shards / "train"), num_loaders=1, step_s=0.1)
    assert fraction < 0.02
    assert said == []


@pytest.mark.slow
def test_a_slow_source_is_named_and_the_advised_number_of_loaders_is_enough(slow_source: str) -> None:
    """4 images of 30 ms and some in steps of 60 ms need at least two threads, 2.2 with headroom and more for the overhead."""
    fraction, said = drive(slow_source, num_loaders=1, step_s=0.06)
    assert fraction > 0.3
    (text,) = said
    assert 3 <= advised(text) <= 6
    better, nothing = drive(slow_source, num_loaders=advised(text), step_s=0.06)
    assert better < 0.05
    assert nothing == []


@pytest.mark.slow
def test_a_run_logs_one_line_and_records_the_wait(
    slow_source: str, load_tiny: LoadTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_tiny(
        f"data.train={slow_source}", "data.eval=null", "data.num_loaders=1", "train.steps=48", "train.global_batch=4"
    )
    folder = RunFolder(str(tmp_path / "run"))
    with caplog.at_level(logging.WARNING, logger="crate_ray.training.monitor"):
        run_training(config, folder, LocalContext())
    lines = [record.message for record in caplog.records if "the loader is the bottleneck" in record.message]
    assert len(lines) == 1
    assert advised(lines[0]) > 1
    waits = [record.values["perf/data_wait_fraction"] for record in read_records(folder) if record.step > WARMUP_STEPS]
    assert sum(waits) / len(waits) > 0.3


def test_reading_in_the_training_thread_is_wait_and_is_measured_directly(shards: Path) -> None:
    """Without loader threads a step reads, then computes: n threads beside it take wait / n, which must be its compute."""
    fraction, said = drive(str(shards / "train"), num_loaders=0, step_s=0.001, batch=16)
    assert fraction > 0.05
    assert advised(said[0]) == math.ceil(1.1 * fraction / (1 - fraction))


@pytest.mark.parametrize(
    ("read_s", "images", "step_s", "enough"),
    [
        (0.010, 64, 0.100, 8),  # 6.4 threads' work, 7.04 with headroom
        (0.002, 256, 0.600, 1),
        (0.002, 4096 / 64, 0.050, 3),
        (0.010, 64, 0.0, 704_000_000),  # a device that takes no time: never enough, no division by zero
    ],
)
def test_enough_loaders_do_the_work_of_a_step_in_its_time(read_s: float, images: float, step_s: float, enough: int) -> None:
    assert enough_loaders(read_s, images=images, step_s=step_s) == enough


def test_the_watch_speaks_once_and_again_when_the_number_has_doubled() -> None:
    watch = LoaderWatch(num_loaders=2, images_per_step=10)
    assert watch.look(Window(10, 10.0, 9.0)) is None  # of the warm-up
    assert watch.look(Window(10, 10.0, 6.0)) is None  # too few steps
    said = watch.look(Window(10, 10.0, 6.0))  # 60% wait: 2 threads / 0.4 x 1.1 = 5.5
    assert said is not None
    assert "60% of the time" in said
    assert "200 ms of a loader," in said
    assert "10 images in 400 ms" in said
    assert advised(said) == 6
    assert watch.look(Window(20, 20.0, 14.0)) is None  # 8 now
    assert watch.look(Window(20, 20.0, 0.9)) is None  # under the threshold
    again = watch.look(Window(20, 20.0, 17.0))
    assert again is not None
    assert advised(again) == 15


def test_what_no_number_of_loaders_can_serve_is_not_advised() -> None:
    watch = LoaderWatch(num_loaders=2, images_per_step=64)
    watch.look(Window(WARMUP_STEPS, 1.0, 0.0))
    said = watch.look(Window(WATCHED_STEPS, 20.0, 19.95))  # 2 threads x 20 s / 0.05 s x 1.1
    assert said is not None
    assert "880 loaders would be needed, more than data.num_loaders can be (256)" in said


def test_time_between_steps_counts_neither_as_step_nor_as_wait() -> None:
    throughput = Throughput(8, CPU)
    with throughput.waiting():
        time.sleep(0.01)
    throughput.step_done()
    time.sleep(0.2)  # an evaluation
    throughput.resume()
    with throughput.waiting():
        time.sleep(0.01)
    throughput.step_done()
    window = throughput.window()
    assert window.steps == 2
    assert 0.02 <= window.wait_s <= window.seconds < 0.2
    assert throughput.window() == Window(0, 0.0, 0.0)


def report_wait(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = largest_of_ranks([[0.1, 7.5], [3.0, 2.0]][rank], world_size=2, device=CPU)
    Path(folder, f"{rank}").write_text(str(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_record_the_wait_of_the_slowest_and_the_memory_of_the_fullest(tmp_path: Path) -> None:
    start_processes(report_wait, (str(tmp_path),), nprocs=2, start_method="spawn")  # type: ignore[no-untyped-call]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[3.0, 7.5]", "[3.0, 7.5]"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("read_s", "least", "most"), [(0.02, 0.0, 0.03), (0.2, 0.55, 0.75)])
def test_on_a_gpu_only_the_time_that_the_device_is_idle_counts(read_s: float, least: float, most: float) -> None:
    """Steps of 70 ms on the device; the host waits for every batch, but what the device computes meanwhile is no wait."""
    device = torch.device("cuda")
    torch.cuda._sleep(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    cycles = int(10_000_000 * 70 / begin.elapsed_time(end))
    throughput, ends = Throughput(1, device), [torch.cuda.Event() for _ in range(20)]
    for step in range(20):
        with throughput.waiting():
            time.sleep(read_s)
        torch.cuda._sleep(cycles)
        ends[step].record()
        if step:
            ends[step - 1].synchronize()  # as the loop, which reads the numbers of a step one step late
        throughput.step_done()
    torch.cuda.synchronize()
    assert least <= throughput.window().wait_fraction <= most
