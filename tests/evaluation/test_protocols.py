"""The protocols and their page say the same."""

import re
from pathlib import Path

import pytest

from crate_ray.evaluation import protocols
from crate_ray.evaluation.protocols import Protocol

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
ALL = [value for value in vars(protocols).values() if isinstance(value, Protocol)]


@pytest.mark.parametrize("protocol", ALL, ids=lambda protocol: protocol.name)
def test_every_protocol_and_its_version_is_a_row_of_the_page(protocol: Protocol) -> None:
    assert f"| `{protocol.stamp}` |" in PAGE
    assert protocol.stamp == f"{protocol.name}/{protocol.version}"


def test_every_row_of_the_page_is_a_protocol() -> None:
    assert sorted(re.findall(r"^\| `([a-z-]+/\d+)` \|", PAGE, flags=re.M)) == sorted(p.stamp for p in ALL)
