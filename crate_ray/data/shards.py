"""WebDataset shards: how members of a tar file make samples, and how our own are packed.

In: member names, or samples as dictionaries of bytes. Out: keys and extensions, or the bytes of a tar file.
Shards are written with webdataset's own writer and fixed metadata, so the same samples give the same bytes. Names split as
webdataset splits them, at the first dot, so that both see the same samples; what kind a member is, its last extension says.
"""

import io
import re
from collections.abc import Collection, Iterable, Mapping

Buffer = bytes | memoryview

IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "webp")
MASK_EXTENSION = "mask.png"
# Formats whose readers run code that the file brings. Nothing here ever opens them.
CODE_EXTENSIONS = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt", "joblib", "dill"})
_METADATA = re.compile(r"__[^/]*__($|/)")  # webdataset's rule for what is no sample


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member name into key and extension at the first dot of the file name, as WebDataset does.

    `n01_1.v2.JPEG` is the member `v2.jpeg` of the sample `n01_1`: the key of webdataset, an image by its last extension.

    Returns:
        Key and extension in lower case; None for what belongs to no sample: hidden files, files without an extension, and
        `__name__` metadata.
    """
    name = name.removeprefix("./")
    if name.startswith("__") and _METADATA.match(name):
        return None
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and extension else None


def kind_of(extension: str) -> str:
    """The last part of an extension, which says what a member is."""
    return extension.rpartition(".")[2]


def runs_code(extension: str) -> bool:
    """Whether reading a member as what it claims to be could run code: pickles, also compressed ones."""
    return not CODE_EXTENSIONS.isdisjoint(extension.split("."))


def image_extensions(extensions: Collection[str]) -> list[str]:
    """Which of a sample's members may be its image: a plain one alone, else all that end in an image format."""
    for extension in IMAGE_EXTENSIONS:
        if extension in extensions:
            return [extension]
    return [name for name in extensions if kind_of(name) in IMAGE_EXTENSIONS and name != MASK_EXTENSION]


def pack_shard(samples: Iterable[Mapping[str, bytes | str]]) -> bytes:
    """Pack samples into a tar archive; the same samples give the same bytes.

    Args:
        samples: Each has `__key__` and members by extension, as bytes.
    """
    from webdataset.writer import TarWriter

    stream = io.BytesIO()
    # An integer time: for a float, tarfile writes an extended header of two more blocks before every member.
    with TarWriter(stream, user="crate-ray", group="crate-ray", mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return stream.getvalue()
