"""Cases in which a process of the report is lost; imports nothing that takes long."""

import os
import signal
import sys
import time

from benchmarks.gpu import part
from benchmarks.gpu.cases import Case


def cases(card, of):
    """A good case, one as asked for, and a good one."""
    ways = {"raise": _raise, "poison": _poison, "crash": _crash, "hang": _hang, "exit": _exit}
    yield Case({"case": "before"}, lambda: {"us": 1.0})
    yield Case({"case": of}, ways[of])
    yield Case({"case": "after"}, lambda: [{"us": 2.0}, {"us": card.read_tb_s}])


def _raise():
    raise ValueError("no such tile")


def _poison():
    part._is_poisoned = lambda: True
    raise RuntimeError("an illegal memory access was encountered")


def _crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang():
    time.sleep(100)


def _exit():
    sys.stdout.write("what it said last\n")
    sys.stdout.flush()
    os._exit(3)
