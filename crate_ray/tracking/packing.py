"""Values as short texts, so that they fit a tag of MLflow: JSON, compressed, in the form that MLflow's pages read too.

In: what JSON can hold. Out: "deflate;" and base64; equal values give equal texts.
"""

import base64
import json
import zlib
from typing import Any

_PREFIX = "deflate;"


def pack(value: Any) -> str:
    """The value as a text."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return _PREFIX + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(text: str) -> Any:
    """The inverse of `pack`.

    Raises:
        ValueError: The text is not of that form.
    """
    try:
        return json.loads(zlib.decompress(base64.b64decode(text.removeprefix(_PREFIX), validate=True)))
    except zlib.error as error:
        raise ValueError(str(error)) from None
