"""What passes between the judge and a candidate's process: messages over a socket, tensors through memory that both see.

To the candidate's process go pickles; what comes back is JSON and bytes, which are checked like results: nothing that a
candidate's process writes is ever executed in the judge's. On another machine, where no memory is shared, the bytes of the
tensors follow their message.
"""

import json
import mmap
import os
import pickle
import select
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fcntl import fcntl
from typing import Any

import torch

from gaugeblock.conformance.engine.inputs.far import far_view, is_far
from gaugeblock.conformance.engine.vocabulary import Tensors

ARENA_BYTES = 4 << 30  # of address space, for the tensors of one direction; only what is used is ever held
RING_BYTES = 32 << 20  # over which the inputs of small calls wander, so that addresses are no names of calls
ALIGNMENT = 64  # bytes, torch's own
MOST_MESSAGE = 64 << 20
MOST_ANSWER = 4 << 20  # of JSON, which takes a multiple of that when it is read
ANYONE = 0  # in place of the process that is expected: whoever speaks first
HEADER = struct.Struct("<QQQ")  # lengths of the message and of the bytes behind it, and where in the arena those belong
CREDENTIALS = struct.Struct("3i")
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2

Dtypes: Mapping[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bool "
        "int64 int32 int16 int8 uint64 uint32 uint16 uint8 complex128 complex64 complex32"
    ).split()
}  # others, quantized or of less than a byte, are no plain memory: to read them there can end the process


class BadMessage(Exception):
    """What came is no message of ours."""


class Closed(Exception):
    """The other side is gone."""


class Late(Exception):
    """Nothing came in time."""


class Impostor(Exception):
    """Another process than the one that was asked has answered."""


@dataclass(frozen=True)
class Placed:
    """A tensor in an arena: `storage` is where its memory begins there, and how many bytes that is.

    Of a `far` one the values alone are there; the view of them is made anew.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: tuple[int, int]
    far: bool = False


class Arena:
    """Memory for tensors, which two processes of one machine can share.

    Args:
        file: Of the memory, from another process's `Arena.file`; None makes new memory.
        shared: Whether there is a file at all.
    """

    def __init__(self, file: int | None = None, *, shared: bool = True) -> None:
        self.file = file
        if shared and file is None:
            self.file = os.memfd_create("gaugeblock", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.file, ARENA_BYTES)
            fcntl(self.file, F_ADD_SEALS, F_SEAL_SHRINK)  # memory that the other side cut off would kill this one
        self.memory = mmap.mmap(-1 if self.file is None else self.file, ARENA_BYTES)

    def flat(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements in the arena, as a tensor with a storage of its own."""
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self.memory, dtype=dtype, count=count, offset=start)

    def place(self, tensors: Mapping[str, torch.Tensor], start: int) -> tuple[dict[str, Placed], int]:
        """Copies the whole memory of tensors, with all that lies between and around their elements.

        Returns:
            Where each is, and where the last one ends.

        Raises:
            ValueError: If they do not fit.
        """
        placed: dict[str, Placed] = {}
        storages: dict[int, tuple[int, int]] = {}
        held = []  # so that no two tensors have one address
        for key, given in tensors.items():
            far = is_far(given)
            # a rank's part of one row is contiguous as it lies, in the far memory of all
            tensor = given.clone(memory_format=torch.contiguous_format) if far else given
            held.append(tensor)
            storage = tensor.untyped_storage()
            size = storage.nbytes()
            if storage.data_ptr() not in storages:
                if start + size > ARENA_BYTES:
                    raise ValueError(f"tensors of more than {ARENA_BYTES >> 30} GiB")
                self.flat(start, size, torch.uint8).copy_(_bytes_of(tensor))
                storages[storage.data_ptr()] = start, size
                start += -(-size // ALIGNMENT) * ALIGNMENT
            where = storages[storage.data_ptr()]
            dtype = str(tensor.dtype).removeprefix("torch.")
            placed[key] = Placed(dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), where, far)
        return placed, start

    def tensors(self, placed: Mapping[str, Placed], device: str = "cpu") -> Tensors:
        """The tensors there; on the CPU in the arena's own memory. Those that share memory share it again."""
        storages: dict[tuple[tuple[int, int], str], torch.Tensor] = {}
        found = {}
        for key, each in placed.items():
            (start, size), dtype = each.storage, Dtypes[each.dtype]
            if (each.storage, each.dtype) not in storages:
                storages[each.storage, each.dtype] = self.flat(start, size // dtype.itemsize, dtype).to(device)
            tensor = storages[each.storage, each.dtype].as_strided(each.shape, each.stride, each.offset)
            found[key] = far_view(tensor) if each.far else tensor
        return found

    def update(self, tensors: Mapping[str, torch.Tensor], placed: Mapping[str, Placed]) -> None:
        """Overwrites what was placed by what now stands in the memory of tensors, which may be a GPU's."""
        for key, tensor in tensors.items():
            start, size = placed[key].storage
            self.flat(start, size, torch.uint8).copy_(_bytes_of(tensor)[:size])

    def write_back(self, tensors: Mapping[str, torch.Tensor], placed: Mapping[str, Placed], before: bytes) -> None:
        """Changes those bytes of the memory of tensors that have changed where they were placed since they were `before`."""
        first = min((each.storage[0] for each in placed.values()), default=0)
        for key, tensor in tensors.items():
            start, size = placed[key].storage
            now, memory = self.flat(start, size, torch.uint8), _bytes_of(tensor)
            if size and bytes(now.numpy().data) != before[start - first : start - first + size]:
                then = torch.frombuffer(bytearray(before[start - first : start - first + size]), dtype=torch.uint8)
                memory.copy_(torch.where(now != then, now, memory))


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The whole memory of a tensor."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


class Link:
    """A connection between the judge and one process of a candidate, with an arena for either direction.

    Args:
        peer: The process that may speak on the other side: `ANYONE` for the one that does so first; None is not looked at.
    """

    def __init__(self, connection: socket.socket, sent: Arena, received: Arena, *, peer: int | None = None) -> None:
        self.connection, self.sent, self.received, self.peer = connection, sent, received, peer
        self.shared = sent.file is not None
        if peer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def send_pickle(self, message: Any, used: tuple[int, int] = (0, 0)) -> None:
        """Sends a message; `used` are the ends of what it placed in the arena."""
        self._send(pickle.dumps(message), used)

    def send_json(self, message: Any, used: tuple[int, int] = (0, 0)) -> None:
        """The same for what a judge will read."""
        self._send(json.dumps(message).encode(), used)

    def _send(self, message: bytes, used: tuple[int, int]) -> None:
        start, stop = (0, 0) if self.shared else used
        try:
            self.connection.sendall(HEADER.pack(len(message), stop - start, start) + message)
            if stop > start:
                self.connection.sendall(memoryview(self.sent.memory)[start:stop])
        except OSError:
            raise Closed from None

    def receive_pickle(self) -> Any:
        """The next message of a judge."""
        return pickle.loads(self._receive(None, None))

    def receive_json(self, deadline: float | None, gone: socket.socket | None = None) -> Any:
        """The next message of a candidate's process.

        Args:
            deadline: As `time.monotonic` counts.
            gone: A file that can be read when that process has ended.

        Raises:
            Closed, Late, Impostor, BadMessage: If there is none.
        """
        try:
            return json.loads(self._receive(deadline, gone, MOST_ANSWER))
        except (ValueError, RecursionError):
            raise BadMessage("no JSON") from None

    def _receive(self, deadline: float | None, gone: socket.socket | None, most: int = MOST_MESSAGE) -> bytes:
        length, behind, start = HEADER.unpack(self._read(HEADER.size, deadline, gone))
        if length > most or (behind and self.shared) or start + behind > ARENA_BYTES:
            raise BadMessage(f"a message of {length} bytes")
        message = self._read(length, deadline, gone)
        if behind:
            self.received.memory[start : start + behind] = self._read(behind, deadline, gone)
        return message

    def _read(self, count: int, deadline: float | None, gone: socket.socket | None) -> bytes:
        parts = []
        while count:
            if deadline is not None:
                self._wait(deadline, gone)
            try:
                part, credentials, *_ = self.connection.recvmsg(min(count, 1 << 20), socket.CMSG_SPACE(CREDENTIALS.size))
            except OSError:
                raise Closed from None
            if not part:
                raise Closed
            for each in credentials if self.peer is not None else ():
                speaker = CREDENTIALS.unpack(each[2])[0]
                if self.peer == ANYONE:
                    self.peer = speaker
                if speaker != self.peer:
                    raise Impostor
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, deadline: float, gone: socket.socket | None) -> None:
        waited: list[Any] = [self.connection] if gone is None else [self.connection, gone]
        ready = select.select(waited, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise Late
        if self.connection not in ready:
            raise Closed  # a child that it left behind may hold the connection open

    def return_arena(self, start: int, stop: int) -> None:
        """Sends what now stands in the arena of what was received, where the other side cannot see it."""
        if not self.shared:
            self.connection.sendall(memoryview(self.received.memory)[start:stop])

    def receive_returned(self, start: int, stop: int, deadline: float, gone: socket.socket | None) -> None:
        """Takes what `return_arena` sent."""
        if not self.shared:
            self.sent.memory[start:stop] = self._read(stop - start, deadline, gone)

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
