"""python -m nas.ondevice FOLDER: the measuring program (see `nas.ondevice.program`)."""

import sys

from nas.ondevice.program import main

if __name__ == "__main__":
    sys.exit(main())
