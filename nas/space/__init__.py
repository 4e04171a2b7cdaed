"""Search spaces: TOML in, networks out."""

from nas.space.load import copy_space, load_space, space_file
from nas.space.space import Choice, Position, Space

__all__ = ["Choice", "Position", "Space", "copy_space", "load_space", "space_file"]
