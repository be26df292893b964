"""A server that forks `autotts` commands from a process that has imported everything, so that they start fast.

`python -m tests.docs.command_server SOCKET` serves until it is terminated. `PROGRAM` takes the place of `autotts`: it
sends its arguments, folder, environment and open files over the socket, and ends with the status that comes back.
"""

from __future__ import annotations

import array
import importlib
import json
import os
import pkgutil
import signal
import socket
import struct
import sys
import traceback
from typing import Any, Final

LARGEST_REQUEST: Final = 1 << 20
STATUS: Final = struct.Struct("i")
PROGRAM: Final = """\
import array, json, os, socket, struct, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({path!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
connection.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
answer = connection.recv(4)
sys.exit(struct.unpack("i", answer)[0] if answer else "the command ended without a status")
"""


def main(path: str) -> None:
    """Import the project, listen, and fork a process for each command."""
    import_all()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the processes of commands
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listening\n")
        sys.stdout.flush()
        while True:
            connection, _ = listening.accept()
            with connection:
                if os.fork() == 0:
                    listening.close()
                    run(connection)


def import_all() -> None:
    """Import the modules that commands use, except programs that run on import."""
    for package in ("discovery", "proxy"):
        parent = importlib.import_module(package)
        for module in pkgutil.walk_packages(parent.__path__, f"{package}."):
            if not module.name.startswith("discovery.answers."):
                importlib.import_module(module.name)


def run(connection: socket.socket) -> None:
    """Run one command in this process, send its status and end."""
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        size = array.array("i").itemsize
        request, ancillary, _, _ = connection.recvmsg(LARGEST_REQUEST, socket.CMSG_SPACE(3 * size))
        files = array.array("i", ancillary[0][2][: 3 * size])
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        arguments, folder, variables = json.loads(request)
        status = _command(arguments, folder, variables)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(STATUS.pack(status))
        os._exit(0)


def _command(arguments: list[str], folder: str, variables: dict[str, Any]) -> int:
    from proxy import cli

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["autotts", *arguments]
    try:
        cli.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
