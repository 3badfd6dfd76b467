"""Weights through shared memory: the trainer writes one segment, every worker process of the same host maps it.

    with shared_memory.publish(model.state_dict()) as source:  # in the trainer
        update.load(source)                                    # where the engine is: `source` is JSON

A segment is a file of mode 0600 in /dev/shm: trainer and engines share the host, the user and (containers:
``--ipc=host``) /dev/shm. It lives as long as the block. Who has it mapped keeps what it sees. CUDA tensors are copied to the
host; that was not run.

Layout, little-endian: ``HEADER`` (the seal, written last; a nonce, also in the source; bytes and crc32 of the manifest;
bytes of all), the manifest as JSON with a crc32 for every tensor, and from the next multiple of 64 bytes on the tensors.

Locks are flock's: they end with their process and hold across containers, where process numbers say nothing. A publisher
has one on a file of its own for as long as it lives; the next publication of anybody removes the segments of dead ones. A
reader has a shared one on its segment for as long as a tensor of it lives: the publisher writes where nobody reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights.transports import packing

if TYPE_CHECKING:
    import torch

FOLDER = "/dev/shm"
HEADER = struct.Struct("<8s16sQIQ")
SEAL = b"vcweight"
_NAME = re.compile(r"vllm_compat-weights-\d+-[0-9a-f]{16}")  # a publisher's file; its segments add "-" and a number


class _Segment:
    """Memory of a publisher's."""

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.fd = os.open(_path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            space = os.fstatvfs(self.fd)
            if space.f_bavail * space.f_frsize < total:  # said at once, not after all there is was taken
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self.fd, 0, total)
            self.memory = mmap.mmap(self.fd, total)  # unmapped with the last view: an error's traceback may hold one
        except OSError as error:
            self.remove()
            space = os.statvfs(FOLDER)
            raise WeightUpdateError(
                f"{FOLDER} has no room for an update of {total:,} bytes ({space.f_bavail * space.f_frsize:,} of "
                f"{space.f_blocks * space.f_frsize:,} are free): {error}. Enlarge it (Docker: --shm-size or --ipc=host; "
                f"Kubernetes: an emptyDir of medium Memory there), or send the weights by files or by a process group"
            ) from error

    def remove(self) -> None:
        _unlink(self.name)
        os.close(self.fd)


class Publisher:
    """Publishes one update after the other, where it can in the same memory: new pages cost more than the copy into them.

    ``dtype``: what tensors of another floating dtype are written as (8-bit ones stay). ``checksum=False`` saves the
    crc32 of every tensor in the trainer and in every worker.
    """

    def __init__(self, *, dtype: str | torch.dtype | None = None, checksum: bool = True) -> None:
        self._dtype, self._checksum = dtype, checksum
        self._name, self._owner, self._made = "", -1, 0
        self._segments: list[_Segment] = []
        self._published = False

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def publish(self, tensors: packing.Tensors, manifest: packing.Manifest | None = None) -> Iterator[dict[str, Any]]:
        """Write ``tensors`` (names to tensors on any device, or pairs) and give the source to load them from.

        With ``manifest`` (name to (shape, dtype as written)) the tensors may come one at a time, in its order; without it
        tied tensors are written once. The source is good until the block ends.

        Raises WeightUpdateError, with nothing left behind: /dev/shm is too small, a tensor is not one or not as promised.
        """
        if self._published:
            raise WeightUpdateError("this publisher has an update published: one at a time")
        items, each = packing.describe(tensors, manifest, self._dtype)
        room = len(_manifest(items, [2**32 - 1] * len(items)))  # no manifest of these items is longer
        segment = self._free(_data_start(room) + sum(item.room for item in items))
        self._published = True
        try:
            yield self._write(segment, room, items, each)
        except BaseException:  # also an interrupt
            self._segments.remove(segment)
            segment.remove()
            raise
        finally:
            self._published = False

    def close(self) -> None:
        """Remove the segments."""
        for segment in self._segments:
            segment.remove()
        self._segments = []
        if self._owner >= 0:
            _unlink(self._name)
            os.close(self._owner)
            self._owner = -1

    def _free(self, total: int) -> _Segment:
        """A segment of so many bytes that nobody reads, locked against readers; others that nobody reads go."""
        if self._owner < 0:
            _sweep()
            self._name, self._owner = _owner()
        found = None
        for segment in list(self._segments):
            if not _locked(segment.fd):
                continue
            if found is None and len(segment.memory) >= total:
                found = segment
            else:
                self._segments.remove(segment)
                segment.remove()
        if found is None:
            self._made += 1
            found = _Segment(f"{self._name}-{self._made}", total)
            self._segments.append(found)
            _locked(found.fd)
        return found

    def _write(self, segment: _Segment, room: int, items: list[packing.Item], each: Iterator[torch.Tensor]) -> dict[str, Any]:
        import torch

        nonce, memory = secrets.token_bytes(16), segment.memory
        memory[: HEADER.size] = bytes(HEADER.size)  # no seal
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        sums, at = [], _data_start(room)
        for item, tensor in zip(items, each, strict=True):
            target = whole[at : at + item.nbytes]
            packing.put(item, tensor, target)
            sums.append(zlib.crc32(target.numpy()) if self._checksum else None)
            at += item.room
        manifest = _manifest(items, sums).ljust(room)
        memory[HEADER.size : HEADER.size + room] = manifest
        memory[: HEADER.size] = HEADER.pack(SEAL, nonce, room, zlib.crc32(manifest), at)
        fcntl.flock(segment.fd, fcntl.LOCK_UN)
        return {"transport": "shared_memory", "segment": segment.name, "nonce": nonce.hex(), "bytes": at}


@contextlib.contextmanager
def publish(
    tensors: packing.Tensors,
    manifest: packing.Manifest | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    checksum: bool = True,
) -> Iterator[dict[str, Any]]:
    """One update by a `Publisher` of its own: see there."""
    with Publisher(dtype=dtype, checksum=checksum) as publisher, publisher.publish(tensors, manifest) as source:
        yield source


class Incoming:
    """A worker's side of one update. The tensors are on the host: a weight loader takes its shard from there."""

    rereadable = True

    def __init__(self, source: Mapping[str, Any]) -> None:
        import torch

        name, nonce, total = source.get("segment"), source.get("nonce"), source.get("bytes")
        if not isinstance(name, str) or not _NAME.fullmatch(name.rpartition("-")[0]) or not isinstance(total, int):
            raise WeightUpdateError(f"{dict(source)!r} is not a source of shared memory: pass on what `publish` gave")
        self._name = name
        try:
            fd = os.open(_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise WeightUpdateError(
                f"shared memory {name} cannot be opened ({error.strerror}): the trainer's block is over, or the trainer is "
                f"not on this host, of this user, or in this container's {FOLDER}"
            ) from error
        try:
            size = os.fstat(fd).st_size
            if size < total or total < HEADER.size:
                raise WeightUpdateError(f"shared memory {name} is cut off: {size:,} of {total:,} bytes")
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WeightUpdateError(f"shared memory {name} is being written: it holds no update that is finished") from None
            # A private map: nothing done to a tensor reaches the segment. It keeps the file open, and so the lock.
            self._memory = mmap.mmap(fd, total, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        seal, found, room, crc, sealed = HEADER.unpack_from(self._memory)
        if seal != SEAL:
            raise WeightUpdateError(f"shared memory {name} is not sealed: the trainer ended before all was written")
        if found.hex() != nonce:
            raise WeightUpdateError(f"shared memory {name} holds another update than this source's, which is over")
        raw = self._memory[HEADER.size : HEADER.size + room]
        if sealed != total or zlib.crc32(raw) != crc:
            raise WeightUpdateError(f"shared memory {name} is damaged: its manifest does not have its checksum")
        try:
            rows, self._sums = json.loads(raw)
        except ValueError as error:
            raise WeightUpdateError(f"shared memory {name} is damaged: {error}") from error
        self._items = packing.parse(rows)
        self._start = _data_start(room)
        if self._start + sum(item.room for item in self._items) != total or len(self._sums) != len(self._items):
            raise WeightUpdateError(f"shared memory {name} is damaged: its manifest does not fit its size")
        self.manifest = packing.manifest_of(self._items)
        self._bytes: torch.Tensor | None = torch.frombuffer(self._memory, dtype=torch.uint8)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors. Raises WeightUpdateError at the first whose bytes do not have their checksum; once all had
        theirs they are not summed again."""
        at = self._start
        for item, wanted in zip(self._items, self._sums):
            if self._bytes is None:
                raise WeightUpdateError(f"shared memory {self._name} was let go of")
            part = self._bytes[at : at + item.nbytes]
            if wanted is not None and zlib.crc32(part.numpy()) != wanted:
                raise WeightUpdateError(f"{item.names[0]}: the bytes in shared memory {self._name} do not have their checksum")
            for name in item.names:
                yield name, packing.view(item, part)
            at += item.room
        self._sums = [None] * len(self._items)

    def close(self, ok: bool) -> None:
        """Let go of the segment. It is unmapped with the last tensor."""
        self._bytes = None
        with contextlib.suppress(BufferError):
            self._memory.close()


def open_source(source: Mapping[str, Any], device: torch.device, timeout: float) -> Incoming:
    """A worker's side of the update that a trainer has published. Nothing here waits.

    Raises WeightUpdateError: the segment is gone, cut off, not sealed, damaged or another update's.
    """
    return Incoming(source)


def _manifest(items: list[packing.Item], sums: Sequence[int | None]) -> bytes:
    return json.dumps([packing.dump(items), sums], separators=(",", ":")).encode()


def _data_start(room: int) -> int:
    return -(-(HEADER.size + room) // packing.ALIGNMENT) * packing.ALIGNMENT


def _path(name: str) -> str:
    return os.path.join(FOLDER, name)


def _unlink(name: str) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):  # gone, or another user's
        os.unlink(_path(name))


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner() -> tuple[str, int]:
    """A publisher's own file, locked: its name and descriptor."""
    while True:
        name = f"vllm_compat-weights-{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(_path(name), os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _locked(fd) and os.fstat(fd).st_nlink:
            return name, fd
        os.close(fd)  # another publisher swept it before it was locked


def _sweep() -> None:
    """Remove what publishers that live no more have left: nobody has their file locked."""
    ours = {name for name in os.listdir(FOLDER) if name.startswith("vllm_compat-weights-")}
    for owner in {match[0] for name in ours if (match := _NAME.match(name))}:
        try:
            fd = os.open(_path(owner), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            fd = -1
        except OSError:  # another user's
            continue
        if fd < 0 or _locked(fd):
            for name in ours:
                if name.startswith(f"{owner}-"):
                    _unlink(name)
            _unlink(owner)
        if fd >= 0:
            os.close(fd)
