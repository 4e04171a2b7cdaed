"""Ends the processes that a dead driver leaves behind; a program of its own, so that it outlives a SIGKILL.

Ray's servers and workers follow their driver within three seconds, but its two agents try for a minute to report the
death to a server that is gone. The driver names the processes and the session folder on the first line of this
program's standard input, and holds the pipe open.
"""

import contextlib
import json
import shutil
import sys
import time

import psutil

_GRACE_SECONDS = 2.0  # for Ray to end by itself


def main() -> None:
    cluster = json.loads(sys.stdin.readline() or '{"family": []}')
    sys.stdin.read()  # returns when the driver closes the pipe or dies
    time.sleep(_GRACE_SECONDS)
    for pid, created in cluster["family"]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1:  # not another process that got the number since
                process.kill()
    if "folder" in cluster:
        shutil.rmtree(cluster["folder"], ignore_errors=True)


if __name__ == "__main__":
    main()
