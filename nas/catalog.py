"""Where named spaces and devices are found: the repository's folders, or the copies that the wheel carries."""

import os
from pathlib import Path

from nas.config import nearest
from nas.errors import NasError

_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """The folder `search_spaces` or `latency_models`: beside the package in a checkout, inside it when installed."""
    checkout = _PACKAGE.parent / kind
    in_checkout = (_PACKAGE.parent / "pyproject.toml").exists() and checkout.is_dir()
    return checkout if in_checkout else _PACKAGE / "_data" / kind


def list_spaces() -> list[str]:
    """Names of the spaces that come with the package."""
    return sorted(p.stem for p in folder("search_spaces").glob("*.toml"))


def list_devices() -> list[str]:
    """Names of the devices that come with the package."""
    return sorted(p.parent.name for p in folder("latency_models").glob("*/device.toml"))


def find(name: str, *, kind: str, file: str, known: list[str], error: type[NasError]) -> Path:
    """The file of a space or device given by name or path.

    Raises:
        NasError: of type `error`, which names the nearest known name.
    """
    if os.sep in name or name.endswith(".toml"):
        path = Path(name) / file if Path(name).is_dir() else Path(name)
        if not path.is_file():
            raise error(f"{name}: there is no such {kind} file. Give a path to a TOML file or one of the known names: "
                        f"{', '.join(known)}.")  # fmt: skip
        return path
    if name not in known:
        raise error(f"unknown {kind} `{name}`.{nearest(name, known, kind='name')} A path to a TOML file works too.")
    return folder("search_spaces") / f"{name}.toml" if kind == "space" else folder("latency_models") / name / file
