"""`python -m crate_ray VERB`."""

from crate_ray.cli.main import run

run()
