"""Connections from other machines: the judge's door, at which processes of ranks knock with a secret name."""

import hmac
import secrets
import socket
import time

from gaugeblock.conformance.engine.processes.wire import Arena, Closed, Late, Link

NAME_BYTES = 64
PATIENCE_SECONDS = 10.0  # for one that has connected to say its name


class Door:
    """Where the processes of ranks that run elsewhere connect to the judge."""

    def __init__(self, host: str) -> None:
        self.listener = socket.create_server((host, 0))
        self.host, self.port = host, self.listener.getsockname()[1]
        self.secret = secrets.token_hex(16)
        self.waiting: dict[str, socket.socket] = {}

    def name_of(self, generation: int, rank: int) -> str:
        """What the process of a rank has to say."""
        return f"{self.secret}/{generation}/{rank}"

    def open(self, name: str, deadline: float) -> Link:
        """The link to the process that says `name`.

        Raises:
            Late: If none comes.
        """
        while name not in self.waiting:
            self.listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = self.listener.accept()
            except TimeoutError:
                raise Late from None
            self._admit(connection)
        connection = self.waiting.pop(name)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Link(connection, Arena(shared=False), Arena(shared=False))

    def _admit(self, connection: socket.socket) -> None:
        connection.settimeout(PATIENCE_SECONDS)
        said = b""
        try:
            while len(said) < NAME_BYTES and (part := connection.recv(NAME_BYTES - len(said))):
                said += part
        except OSError:
            pass
        connection.settimeout(None)
        name = said.decode(errors="replace").strip()
        if hmac.compare_digest(name.partition("/")[0].encode(), self.secret.encode()):
            self.waiting[name] = connection
        else:
            connection.close()


def knock(host: str, port: str, name: str) -> Link:
    """The same link from the other side."""
    try:
        connection = socket.create_connection((host, int(port)), timeout=60)
    except OSError as error:
        raise Closed(f"{host}:{port}: {error}") from None
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(name.encode().ljust(NAME_BYTES))
    return Link(connection, Arena(shared=False), Arena(shared=False))
