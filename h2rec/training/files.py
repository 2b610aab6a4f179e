"""Files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from h2rec._files import replacing


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON: a NaN is our mistake, and fails."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a run.

    Raises:
        ValueError: it is not a JSON object; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object")
    return content
