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
