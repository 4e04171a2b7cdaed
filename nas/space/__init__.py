"""Search spaces: TOML in, networks out."""

from nas.space.load import load_space, space_file
from nas.space.space import Choice, Position, Space

__all__ = ["Choice", "Position", "Space", "load_space", "space_file"]
