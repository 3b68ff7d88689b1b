"""A real S3 server on this machine (moto's), behind a wire that can be cut in the middle of an answer, or be slow."""

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.request import Request, urlopen

import pytest

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "id-of-tests",
    "AWS_SECRET_ACCESS_KEY": "secret-of-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # botocore's own, below those of s3fs and ours: what is gone is said sooner
}
BODY = 4096
"""What comes in pieces of at least so many bytes are files, not questions and lists."""


class Wire:
    """Passes bytes between clients and the server. `num_bytes` counts what clients got; the next `num_cuts` pieces of
    files, to the server or from it, are cut in their middle and their connections closed; each piece of an answer comes
    `pause_s` later, and the next `num_stalls` pieces of files never; `down` refuses everything."""

    def __init__(self, port: int) -> None:
        self.server = port
        self.num_bytes = self.num_cuts = self.num_stalls = 0
        self.pause_s = 0.0
        self.down = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                if self.down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.server))
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if answers:
                    time.sleep(self.pause_s)
                if self.down:
                    break
                if self.num_cuts and len(data) >= BODY:
                    self.num_cuts -= 1
                    target.sendall(data[: len(data) // 2])
                    break
                if answers and self.num_stalls and len(data) >= BODY:
                    self.num_stalls -= 1
                    return  # and nothing is closed
                self.num_bytes += len(data) * answers
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve() -> Iterator[Wire]:
    """The environment points to it meanwhile; there is a bucket called `bucket`."""
    moto = pytest.importorskip("moto.server", reason="no moto, of mcir[dev]: an S3 server on this machine")
    from s3fs import S3FileSystem

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port()[1])
    before = dict(os.environ)
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=wire.endpoint)
    urlopen(Request(f"{wire.endpoint}/moto-api/reset", method="POST"))  # what the server before held
    S3FileSystem.clear_instance_cache()
    S3FileSystem().mkdir("bucket")
    try:
        yield wire
    finally:
        wire.listener.close()
        server.stop()
        S3FileSystem.clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)
