"""Compiling the library of `nas.native`, when the package is installed: hatch_build.py calls this, nobody needs to.

It is a module of its own, which imports nothing but the standard library, because the package does not exist yet when
its wheel is built.
"""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "kernels.cc"  # and the headers beside it
LIBRARY = FOLDER / "kernels.so"

# No -march: the library runs on every machine of its architecture, and chooses wider instructions when it is loaded.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
COMPILE_SECONDS = 600.0


class BuildError(Exception):
    """The library cannot be compiled here. The package does without."""


def compiler() -> list[str] | None:
    """The command of a C++ compiler, `$CXX` before others; None where there is none or NAS_NATIVE=0 declines."""
    if os.environ.get("NAS_NATIVE") == "0" or os.name != "posix":
        return None
    chosen = os.environ.get("CXX")
    for command in [chosen] if chosen else ["c++", "g++", "clang++"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    return None


def source_hash() -> str:
    """What the library is compiled with, so that one of another source is found out when it is loaded."""
    files = [SOURCE, *sorted(FOLDER.glob("*.h"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def headers() -> Path | None:
    """The folder of XLA's headers: that of a jaxlib which can be imported, or which the package is installed beside.

    The second is for pip, which builds where nothing that is installed can be imported.
    """
    spec = importlib.util.find_spec("jaxlib")
    homes = [*(spec.submodule_search_locations or [] if spec else []), f"{sysconfig.get_path('platlib')}/jaxlib"]
    return next((folder for home in homes if (folder := Path(home) / "include").is_dir()), None)


def build() -> Path:
    """Compiles the library and replaces the one that is there.

    Raises:
        BuildError: a compiler or jaxlib is missing, or compiling fails; a library that was there still is.
    """
    command, include = compiler(), headers()
    if command is None:
        raise BuildError("there is no C++ compiler (c++, g++, clang++ or $CXX) on the path, or NAS_NATIVE=0 is set")
    if include is None:
        raise BuildError("there is no jaxlib, whose headers it needs")
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".build-") as scratch:
        part = Path(scratch) / LIBRARY.name
        define = f'-DNAS_SOURCE="{source_hash()}"'
        words = [*command, *FLAGS, define, "-isystem", str(include), str(SOURCE), "-o", str(part)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as e:
            raise BuildError(f"{command[0]} cannot be run: {e}") from e
        if done.returncode or not part.exists():
            raise BuildError(f"{shlex.join(words)} failed:\n{done.stderr.strip()[-2000:]}")
        os.replace(part, LIBRARY)
    return LIBRARY
