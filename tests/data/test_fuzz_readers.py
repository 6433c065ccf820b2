"""The two parsers that meet a stranger's bytes first, the tar walk and the image headers, on bytes that nobody planned.

Whatever they are given, they end, raise nothing but errors of our own, and read no byte outside of what they were given.
Here hypothesis mutates sound files for a second or two. The coverage-guided run (atheris, libFuzzer) is
`python tests/data/fuzz_readers.py --seconds 60`; see there.
"""

import pytest
from fuzz_readers import HEADER_SEEDS, TAR_SEEDS, check_header, check_png, check_tar
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A sound file with some bytes changed, put in, taken out or cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        change = draw(st.sampled_from(["set", "insert", "delete", "cut", "copy"]))
        if change == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=12))
        elif change == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=600))
        elif change == "delete":
            del data[at : at + draw(st.integers(1, 600))]
        elif change == "copy":
            data[at:at] = data[at : at + draw(st.integers(1, 1024))]
        else:
            del data[at:]
    return bytes(data)


@QUICK
@given(mutated(TAR_SEEDS), st.booleans())
def test_the_tar_walk_survives_any_bytes(data, repair):
    check_tar(data, repair=repair)


@QUICK
@given(mutated(HEADER_SEEDS))
@example(b"\xff\xd8\xff" + b"\xff" * 100_000)
@example(b"\xff\xd8\xff\x01" + b"\xff\x01" * 100_000)
@example(b"\xff\xd8\xff\xe0\0\0" + b"\xff\xe0\0\0" * 100_000)
def test_the_image_headers_survive_any_bytes(data):
    check_header(data)


@QUICK
@given(mutated([seed for seed in HEADER_SEEDS if seed.startswith(b"\x89PNG")]))
def test_the_png_check_survives_any_bytes(data):
    check_png(data)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_tar, check_header, check_png])
def test_random_bytes_in_numbers(check):
    @settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.binary(max_size=3000), mutated(TAR_SEEDS if check is check_tar else HEADER_SEEDS)))
    def run(data: bytes) -> None:
        check(data)

    run()
