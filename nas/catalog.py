"""Where named spaces and devices are found: folders of one's own, then those that come with the package."""

import os
from pathlib import Path

from nas.config import nearest
from nas.errors import NasError

_PACKAGE = Path(__file__).parent


def folder(kind: str) -> Path:
    """The package's `search_spaces` or `latency_models`: beside it in a checkout, inside it when installed."""
    checkout = _PACKAGE.parent / kind
    in_checkout = (_PACKAGE.parent / "pyproject.toml").exists() and checkout.is_dir()
    return checkout if in_checkout else _PACKAGE / "_data" / kind


def folders(kind: str) -> list[Path]:
    """Where names are looked for: the current folder's `search_spaces` or `latency_models`, then the package's."""
    own, package = Path.cwd() / kind, folder(kind)
    return [own, package] if own.is_dir() and own.resolve() != package.resolve() else [package]


def list_spaces() -> list[str]:
    """Names of the spaces in ./search_spaces, if there is such a folder, and of those that come with the package."""
    return sorted({p.stem for f in folders("search_spaces") for p in f.glob("*.toml")})


def list_devices() -> list[str]:
    """Names of the devices in ./latency_models, if there is such a folder, and of those that come with the package."""
    return sorted({p.parent.name for f in folders("latency_models") for p in f.glob("*/device.toml")})


def find(name: str, *, kind: str, file: str, known: list[str], error: type[NasError]) -> Path:
    """The file of a space or device given by name or path. Of two with one name, the current folder's is taken.

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
    return next(p for p in _named(name, kind, file) if p.is_file())


def own(name: str, *, kind: str, file: str) -> Path | None:
    """The file that a name stands for in the current folder only; None where it is the package's, or a path."""
    path = _named(name, kind, file)[0]
    return path if len(_named(name, kind, file)) > 1 and path.is_file() and os.sep not in name else None


def _named(name: str, kind: str, file: str) -> list[Path]:
    if kind == "space":
        return [f / f"{name}.toml" for f in folders("search_spaces")]
    return [f / name / file for f in folders("latency_models")]
