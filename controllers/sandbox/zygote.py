"""The zygote: the process that forks sandbox processes. It has loaded the modules they may use, and holds no secret.

It starts with an empty environment in the root folder and carries out its owner's orders one at a time:

    SPAWN, layers + a socket  → the new process id          the process seals itself and serves
    TRY, layers, attempt + …  → the new process id          the process seals itself and tries to break out
    REAP, process id          → its wait status             waits for its end; until then the id is not reused

A failed order is answered with the negative error number.
"""

from __future__ import annotations

import bisect
import errno
import functools
import gc
import heapq
import itertools
import math
import os
import random
import resource
import socket
import statistics
import struct
import sys
import typing
from typing import Final, NoReturn

import controllers.baselines
from controllers.sandbox import attempts, process
from controllers.sandbox.frames import encode_text, pack
from controllers.sandbox.seal import Layer, SealLayerMissing, prepare, seal

PRELOADED: Final = (bisect, functools, heapq, itertools, math, resource, statistics, typing, controllers.baselines)
"""Modules that controllers and the seal need: nothing can be imported later. This package imports the others."""

SPAWN, TRY, REAP = range(3)
COLLECTED_EVERY: Final = 10_000
"""Objects after which a sandbox process looks for garbage: by Python's 700 it would spend more time on it than
decisions of small rounds take."""
ORDER: Final = struct.Struct("=iii")  # what to do, layers or process id, attempt
REPLY: Final = struct.Struct("=i")


def main(descriptor: int) -> None:
    """Serve the owner at the other end of `descriptor` until it closes the channel."""
    owner, zygote = socket.socket(fileno=descriptor), os.getpid()
    # What all processes would do alike is done once, before they are forked.
    os.environ.clear()
    process.only_built_in_imports()
    prepare()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECTED_EVERY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(owner, ORDER.size, 1)
        if not message:
            return
        what, first, attempt = ORDER.unpack(message)
        try:
            if what == REAP:
                _, result = os.waitpid(first, 0)
            else:
                result = os.fork()
                if result == 0:
                    _run_process(zygote, descriptors[0], Layer(first), attempt if what == TRY else None)
        except OSError as error:  # no memory for another process, or too many: the existing ones continue
            result = -(error.errno or errno.EIO)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        owner.sendall(REPLY.pack(result))


def _run_process(parent: int, channel: int, layers: Layer, attempt: int | None) -> NoReturn:
    """Seal this process and serve, or make an attempt. It never returns."""
    status = 1
    try:
        os.dup2(channel, process.CHANNEL)
        os.closerange(process.CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        os.close(nowhere)
        random.seed(0)  # `statistics` imports it, and a fork reseeds it: all processes must draw the same numbers
        try:
            seal(layers, parent)
        except SealLayerMissing as error:
            status = attempts.NOT_SEALED
            os.write(process.CHANNEL, pack(encode_text(str(error))))
        else:
            status = 0
            if attempt is None:
                process.serve()
            else:
                status = attempts.run(attempt, process.CHANNEL)
    except BaseException as error:  # a forked process must never return to the zygote's loop
        os.write(process.CHANNEL, pack(encode_text(repr(error))))
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
