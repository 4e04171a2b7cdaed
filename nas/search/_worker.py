"""One worker of the processes executor: a program of its own, which `nas.search.processes` starts by its path.

Arguments: the cores to keep to, as a JSON list, and the descriptor of the file with recipe and weights. Requests come
on standard input, one JSON list `[trial, genotype]` a line; answers leave on what was standard output when it began.
Whatever the evaluator prints goes to standard error. When standard input ends, so does the worker, whatever it is at.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any


def main() -> None:
    cores, descriptor = json.loads(sys.argv[1]), int(sys.argv[2])
    if hasattr(os, "sched_setaffinity"):  # not on macOS; before anything heavy is imported and starts threads
        os.sched_setaffinity(0, cores)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # where memory runs out, Linux ends a worker rather than the driver
    # Copies that no process started by the evaluator inherits, and that nothing it prints or reads can disturb.
    requests, answers = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    asked: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, asked), daemon=True).start()

    import numpy as np

    from nas.search.executor import build, evaluate_one
    from nas.search.processes import unpack

    recipe, weights = unpack(descriptor)
    try:
        evaluate = build(recipe["factory"], recipe["kwargs"], weights)
    except Exception as e:
        answer({"broken": repr(e)})
        return
    answer({"ready": True})
    while True:
        trial, genotype = asked.get()
        result = evaluate_one(evaluate, np.array(genotype, np.uint8))
        answer({"trial": trial, "correct": result.correct, "seconds": result.seconds, "failure": result.failure})


def _listen(requests: int, asked: "SimpleQueue[Any]") -> None:
    """Queues what is asked for; ends this process, and those that it has started, when the driver is gone."""
    with open(requests, "rb") as lines:
        for line in lines:
            asked.put(json.loads(line))
    with contextlib.suppress(OSError):  # not the leader of its group: started by hand
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
