"""A finder that has never heard of some packages: what an interpreter without them does."""

WITHOUT = """
import sys

class Without:  # a finder that has never heard of the missing packages
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else self._finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def without(*packages: str) -> str:
    """Source that hides packages from the interpreter that runs it first; `MISSING` are their names."""
    return f"MISSING = {set(packages)}\n{WITHOUT}"
