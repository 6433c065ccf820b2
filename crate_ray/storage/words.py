"""Sizes as a person reads them."""


def bytes_in_words(size: float) -> str:
    """A number of bytes with three digits: `4.91 MiB`, `1.2 TiB`."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1000 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
