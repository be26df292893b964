"""The process sealed children are forked from. It has loaded what they may use, and knows no secret.

It is started with an empty environment, in the root folder, and does what its owner's orders say, one at a time:

    SPAWN, layers + a socket  → the child's process id      the child seals itself and serves
    TRY, layers, attempt + …  → the child's process id      the child seals itself and tries to break out
    REAP, process id          → its wait status             waits for its end; until then the id is nobody else's

What could not be done is answered with the negative error number.
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
from controllers.sandbox.seal import Layer, SealLayerMissing, seal

PRELOADED: Final = (bisect, functools, heapq, itertools, math, resource, statistics, typing, controllers.baselines)
"""What controllers may import, and the seal: later nothing can be imported. This package itself brings the rest."""

SPAWN, TRY, REAP = range(3)
ORDER: Final = struct.Struct("=iii")  # what to do, layers or process id, attempt
REPLY: Final = struct.Struct("=i")


def main(descriptor: int) -> None:
    """Serve the owner at the other end of `descriptor` until it leaves."""
    owner, zygote = socket.socket(fileno=descriptor), os.getpid()
    gc.collect()
    gc.freeze()
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
                    _become_child(zygote, descriptors[0], Layer(first), attempt if what == TRY else None)
        except OSError as error:  # no memory or no place for another process: those there are go on
            result = -(error.errno or errno.EIO)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        owner.sendall(REPLY.pack(result))


def _become_child(parent: int, channel: int, layers: Layer, attempt: int | None) -> NoReturn:
    """Never returns, whatever happens."""
    status = 1
    try:
        os.dup2(channel, process.CHANNEL)
        os.closerange(process.CHANNEL + 1, os.sysconf("SC_OPEN_MAX"))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        os.close(nowhere)
        os.environ.clear()
        random.seed(0)  # `statistics` brings it along, and a fork sows it anew: what is drawn is the same for all
        process.only_built_in_imports()
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
    except BaseException as error:  # a child must never come back into the zygote's loop
        os.write(process.CHANNEL, pack(encode_text(repr(error))))
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
