"""The manifest of a bundle: what to time, how, and for how long."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.errors import LatencyError
from nas.ondevice.results import SCHEMA

MANIFEST = "manifest.json"


def load_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a bundle.

    Raises:
        LatencyError: there is none, or it is of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LatencyError(f"{path}: this is no bundle: {e}. Make one with `nas measure SPACE --bundle`.") from e
    if manifest.get("schema") != SCHEMA:
        raise LatencyError(
            f"{path}: a bundle of schema {manifest.get('schema')}, and this program reads {SCHEMA}: another version "
            f"times in another way. Make it anew with `nas measure`, in another folder or after removing this one."
        )
    if manifest.get("sha256") != checksum(manifest):
        raise LatencyError(f"{path}: it was edited or damaged; only `settings` may change. Copy the bundle again.")
    return manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says, but for `settings`, which only say how long to measure."""
    deciding = {key: value for key, value in manifest.items() if key not in ("settings", "sha256")}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
