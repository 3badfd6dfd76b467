"""Weights over a torch.distributed group of their own: the trainer and every worker process of every engine.

    sender = process_group.Sender(workers=4)          # in the trainer; tensor parallel 2, two replicas
    with sender.send(model.state_dict()) as source:   # a thread sends while the block runs
        update.load(source)                           # where the engines are: `source` is JSON
    sender.close()

Two connections. Over a TCP connection that each worker makes to the sender go the manifest, each worker's consent, and
every failure; whoever dies is seen by it at once. The bytes go by broadcasts of a group of rank 0 (trainer) and 1, 2, …
(workers as they come), NCCL or Gloo, which vLLM's groups and the trainer's do not know of. It is made at the first update
and kept; after a failure, or when a worker has been replaced, the next update makes a new one.

The bytes: whole tensors, each at a multiple of 64 bytes, packed into buckets; a tensor larger than a bucket goes alone, in
pieces. While one bucket is on the wire the sender packs the next and a worker uses the last, so each side holds two.
They have no checksum of ours.

NCCL was not run by the authors of this file: Gloo was. With NCCL a trainer may not share its GPU with a worker, and
torch's watchdog may end a process whose peer died (TORCH_NCCL_ASYNC_ERROR_HANDLING=0 in its environment keeps it from that).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import select
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights.transports import packing

if TYPE_CHECKING:
    import torch

_LENGTH = struct.Struct(">I")
_LONGEST = 1 << 28  # bytes of a message: no manifest comes near
_PAUSE = 0.0005  # seconds between two looks at a broadcast under way
_STRANGER = 5.0  # seconds a new connection has to finish its first message


class _Line:
    """A TCP connection that carries JSON messages, each after its length."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def say(self, message: Any, timeout: float) -> None:
        raw = json.dumps(message, separators=(",", ":")).encode()
        self.socket.settimeout(timeout)
        self.socket.sendall(_LENGTH.pack(len(raw)) + raw)

    def hear(self, timeout: float) -> Any:
        """The next message. Raises OSError (TimeoutError, ConnectionError), ValueError if it is none."""
        deadline = time.monotonic() + timeout
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > _LONGEST:
            raise ValueError("not a message")
        return json.loads(self._read(length, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self.socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise ConnectionError("the connection is closed")
            parts += part
        return bytes(parts)

    def waits(self, timeout: float = 0.0) -> bool:
        """Whether there is something to hear, or it is closed."""
        return bool(self._poll.poll(timeout * 1000))

    def close(self) -> None:
        self.socket.close()


@dataclass(frozen=True)
class _Frame:
    """One broadcast: whole items (index, offset in the bucket), or so many bytes of one from ``start`` on."""

    parts: tuple[tuple[int, int], ...]
    nbytes: int
    start: int | None = None


def _frames(items: list[packing.Item], bucket: int) -> list[_Frame]:
    frames: list[_Frame] = []
    parts: list[tuple[int, int]] = []
    filled = 0

    def finish() -> None:
        nonlocal parts, filled
        if parts:
            frames.append(_Frame(tuple(parts), filled))
        parts, filled = [], 0

    for index, item in enumerate(items):
        if item.room > bucket:
            finish()
            frames += [_Frame(((index, 0),), min(bucket, item.nbytes - start), start) for start in range(0, item.nbytes, bucket)]
            continue
        if filled + item.room > bucket:
            finish()
        parts.append((index, filled))
        filled += item.room
    finish()
    return frames


class _Group:
    """A backend of torch.distributed without torch.distributed's global state."""

    def __init__(
        self,
        backend: str,
        place: tuple[str, int, socket.socket | None],  # of the store; its listener where it is ours
        local: str,  # the address of this host that the sender reaches
        rank: int,
        size: int,
        timeout: float,
    ) -> None:
        import datetime

        import torch.distributed as dist

        address, port, listener = place
        limit = datetime.timedelta(seconds=timeout)
        # libuv's store of torch 2.6 takes no listener of ours, which is bound to one address rather than to all.
        self._store = dist.TCPStore(
            address,
            port,
            is_master=listener is not None,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
            use_libuv=False,
        )
        store = dist.PrefixStore("vllm_compat", self._store)
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            # Ours is the shorter limit: torch's watchdog answers its own by ending the process.
            options._timeout = limit + datetime.timedelta(hours=1)
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = limit
            # The interface that reaches the sender, not the one that this host's name happens to resolve to.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=local)]
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        self._nccl = backend == "nccl"
        self._flying: list[Any] = []
        self._buckets: list[torch.Tensor] = []
        self._options = dist.BroadcastOptions()
        self._options.rootRank, self._options.rootTensor = 0, 0
        if not self._nccl:
            self._options.timeout = limit

    def broadcast(self, tensor: torch.Tensor) -> Any:
        work = self._group.broadcast([tensor], self._options)
        self._flying = [other for other in self._flying if not other.is_completed()] + [work]
        return work

    def buckets(self, frames: list[_Frame], device: torch.device, pinned: bool = False) -> list[torch.Tensor]:
        """Two buffers for the frames that hold whole tensors. On the host they stay: new pages cost more than what is copied
        into them; a GPU's allocator has none of that."""
        import torch

        size = max((frame.nbytes for frame in frames if frame.start is None), default=0)
        kept = self._buckets
        if not kept or kept[0].numel() < size:
            kept = [torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned) for _ in range(2)]
        self._buckets = kept if device.type == "cpu" else []
        return kept

    def drop(self) -> None:
        """Take the group down, without waiting for broadcasts that will not finish."""

        def end() -> None:
            if self._nccl:
                self._group.abort()
            # Gloo's destructor waits for them, and a process that ends meanwhile is aborted by C++: nothing is destroyed
            # before its limit has ended them, or a process that ends earlier.
            while not all(work.is_completed() for work in self._flying):
                time.sleep(0.1)
            del self._group, self._store, self._buckets

        threading.Thread(target=end, name="vllm_compat-drop-group", daemon=True).start()


def _finish(work: Any, look: Callable[[float], None], timeout: float, what: str) -> None:
    """Wait for a broadcast; ``look(seconds)`` looks at the connections meanwhile and raises what it finds."""
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        look(_PAUSE)
        if time.monotonic() > deadline:
            raise WeightUpdateError(f"{what}: no progress for {timeout:g} s")
    try:
        work.wait()
    except RuntimeError as error:
        look(0.2)  # who died says more than a broken broadcast
        raise WeightUpdateError(f"{what}: the broadcast failed: {str(error).splitlines()[0]}") from error


@dataclass
class _Worker:
    line: _Line
    name: str  # host and process
    rank: int = 0
    state: str = "idle"
    again: bool = False  # it has the update and asks for it once more


class Sender:
    """The trainer's side: rank 0 of a group with ``workers`` worker processes (tensor parallel size × engines).

    ``address``: of this host, where the workers reach it and where alone the sender listens; ``port`` 0: a free one.
    ``backend``: "nccl" or "gloo"; by default NCCL where ``device`` (by default the current CUDA device, if there is one)
    is CUDA. ``dtype``: what tensors of another floating dtype are sent as (8-bit ones stay). ``bucket`` in bytes.
    ``timeout``: the seconds of every wait for a worker.

    A process is one worker: two engines inside one process cannot both take part.

    Whoever reaches ``address`` and knows a source may join, and a group's own connections (NCCL, Gloo) ask nobody: use
    a network you trust. Not for several threads at once.
    """

    def __init__(
        self,
        workers: int,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        backend: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        bucket: int = 256 << 20,
        timeout: float = 300.0,
    ) -> None:
        import torch

        if workers < 1 or bucket < packing.ALIGNMENT or timeout <= 0:
            raise WeightUpdateError(
                f"workers={workers}, bucket={bucket}, timeout={timeout}: at least 1, {packing.ALIGNMENT}, above 0"
            )
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() and backend != "gloo" else "cpu"
        self._device = torch.device(device)
        self._backend = backend or ("nccl" if self._device.type == "cuda" else "gloo")
        _usable(self._backend, self._device)
        self._workers, self._bucket, self._timeout, self._dtype = (
            workers,
            bucket // packing.ALIGNMENT * packing.ALIGNMENT,
            timeout,
            dtype,
        )
        self._token, self._update = secrets.token_hex(16), 0
        self._group: _Group | None = None
        self._known: list[_Worker] = []
        self._strangers: list[_Line] = []
        self._thread: threading.Thread | None = None
        self._stop = ""  # why the block that runs beside the thread wants it to end
        self._failed = ""  # what whoever comes late is told
        self._over = threading.Event()  # the block has ended
        self._address = address
        self._listener = _listen(address, port)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def send(self, tensors: packing.Tensors, manifest: packing.Manifest | None = None) -> Iterator[dict[str, Any]]:
        """Send ``tensors`` (names to tensors on any device, or pairs) while the block runs, which has to have every worker
        load the source it is given. The block's end waits for all of them. The tensors must not change meanwhile.

        With ``manifest`` (name to (shape, dtype as sent)) the tensors may come one at a time, in its order, asked for in the
        sending thread; without it tied tensors are sent once.

        Raises WeightUpdateError: a worker did not come, refused, died or stopped (with its rank, host and process), or a tensor
        is not one or not as promised. If the block raises, its error goes on, with the sender's as a note.
        """
        if self._listener.fileno() < 0:
            raise WeightUpdateError("this sender is closed")
        if self._thread is not None:
            raise WeightUpdateError("this sender has an update under way: one at a time")
        items, each = packing.describe(tensors, manifest, self._dtype)
        self._update += 1
        self._stop = self._failed = ""
        self._over.clear()
        errors: list[BaseException] = []
        ready = self._event()
        self._thread = threading.Thread(
            target=self._run, args=(items, each, ready, errors), name="vllm_compat-send-weights", daemon=True
        )
        self._thread.start()
        try:
            yield {
                "transport": "process_group",
                "address": self._address,
                "port": self._listener.getsockname()[1],
                "token": self._token,
                "update": self._update,
            }
        except BaseException as error:
            self._stop = f"the trainer's block raised {type(error).__name__}: {error}"
            self._join()
            if errors and self._stop not in str(errors[0]):
                error.add_note(f"vllm_compat: the sender: {errors[0]}")
            raise
        self._join()
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Take the group down and let the workers go."""
        self._stop = "the sender was closed"
        self._join()
        self._forget()
        self._selector.close()
        self._listener.close()

    def _join(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _event(self) -> Any:
        """What the trainer's stream has to have done before the tensors are what they are."""
        import torch

        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _run(self, items: list[packing.Item], each: Iterator[torch.Tensor], ready: Any, errors: list[BaseException]) -> None:
        import torch

        try:
            with contextlib.ExitStack() as stack:
                if ready is not None:
                    side = torch.cuda.Stream(self._device)
                    stack.enter_context(torch.cuda.stream(side))  # also makes the device this thread's
                    side.wait_event(ready)
                self._serve(items, each)
            self._linger()
        except BaseException as error:
            why = str(error) if isinstance(error, WeightUpdateError) else f"{type(error).__name__}: {error}"
            for worker in self._known:
                with contextlib.suppress(OSError):
                    worker.line.say({"failed": why}, 1.0)
            self._forget()
            if not isinstance(error, WeightUpdateError):
                error = WeightUpdateError(f"the weights were not sent: {why}").with_traceback(error.__traceback__)
            errors.append(error)
            self._failed = why or "the sender failed"
            self._linger()

    def _linger(self) -> None:
        """Answer whoever comes while the block runs: one worker too many, or one later than the failure."""
        while not self._over.is_set():
            self._look(0.005, lenient=True)
            self._dismiss()

    def _dismiss(self) -> None:
        for worker in [worker for worker in self._known if worker.again]:
            self._lose(worker, "this update of the sender has come in: a source is loaded once")

    def _serve(self, items: list[packing.Item], each: Iterator[torch.Tensor]) -> None:
        rows = packing.dump(items)
        self._dismiss()
        for worker in self._known:
            worker.state = "idle"
        self._look(0.0, lenient=True)  # a worker of the last update may be gone: its successor comes, into a new group
        offer = {"update": self._update, "backend": self._backend, "bucket": self._bucket, "items": rows}

        def all_in(state: str) -> bool:
            for worker in self._known:
                if worker.state == "asks":
                    worker.line.say(offer, self._timeout)
                    worker.state = "has the manifest"
            return len(self._known) == self._workers and all(worker.state == state for worker in self._known)

        self._until(lambda: all_in("ready"), "ready")
        if self._group is None:
            self._connect()
        else:
            for worker in self._known:
                worker.line.say({"go": None}, self._timeout)
        self._stream(items, each)
        self._until(lambda: all_in("done"), "done")

    def _connect(self) -> None:
        listener = _listen(self._address, 0)
        local, port = listener.getsockname()[:2]
        size = self._workers + 1
        for rank, worker in enumerate(self._known, 1):
            worker.rank = rank
            worker.line.say({"go": {"port": port, "rank": rank, "size": size}}, self._timeout)
        self._group = _group(self._backend, (self._address, port, listener), local, 0, size, self._timeout)

    def _stream(self, items: list[packing.Item], each: Iterator[torch.Tensor]) -> None:
        import torch

        assert self._group is not None
        frames = _frames(items, self._bucket)
        on_gpu = self._backend == "nccl"
        device = self._device if on_gpu else torch.device("cpu")
        buckets = self._group.buckets(frames, device, pinned=self._device.type != device.type)
        flying: deque[tuple[Any, torch.Tensor, str]] = deque()  # the bytes live as long as they are on the wire
        large: torch.Tensor | None = None
        for number, frame in enumerate(frames):
            if len(flying) == 2:
                work, _, name = flying.popleft()
                _finish(work, self._look, self._timeout, name)
            name = items[frame.parts[0][0]].names[0]
            if frame.start is None:
                load = buckets[number % 2][: frame.nbytes]
                for index, offset in frame.parts:
                    packing.put(items[index], next(each), load[offset : offset + items[index].nbytes])
            else:
                if frame.start == 0:
                    large = packing.flat(items[frame.parts[0][0]], next(each)).to(device)
                assert large is not None
                load = large[frame.start : frame.start + frame.nbytes]
            if frame.nbytes:
                flying.append((self._group.broadcast(load), load, name))
        next(each, None)  # a promised update says here if there was more
        for work, _, name in flying:
            _finish(work, self._look, self._timeout, name)

    def _until(self, done: Callable[[], bool], state: str) -> None:
        deadline = time.monotonic() + self._timeout
        while not done():
            self._look(0.05)
            if time.monotonic() > deadline:
                late = [self._label(worker) for worker in self._known if worker.state != state]
                missing = self._workers - len(self._known)
                if missing:
                    late.append(f"{missing} of {self._workers} workers, which did not come")
                raise WeightUpdateError(f"not {state} after {self._timeout:g} s: {', '.join(late)}")

    def _look(self, seconds: float, lenient: bool = False) -> None:
        """Hear whoever speaks within so many seconds. Raises what a worker says has failed, and that one is gone; ``lenient``,
        where none has a part in anything, lets it go."""
        if self._stop and not self._failed:
            raise WeightUpdateError(self._stop)
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                connection, _ = self._listener.accept()
                line = _Line(connection)
                self._strangers.append(line)
                self._selector.register(connection, selectors.EVENT_READ, line)
            elif isinstance(key.data, _Line):
                self._meet(key.data)
            else:
                try:
                    self._listen_to(key.data)
                except WeightUpdateError as error:
                    if not lenient:
                        raise
                    self._lose(key.data, str(error))

    def _meet(self, line: _Line) -> None:
        self._strangers.remove(line)
        self._selector.unregister(line.socket)
        try:
            message = line.hear(_STRANGER)
            token = message["token"]
            worker = _Worker(line, str(message["worker"]))
            if not hmac.compare_digest(str(token), self._token):
                raise ValueError
            self._take(worker, message)
            if self._failed:
                raise WeightUpdateError(self._failed)
        except (OSError, ValueError, KeyError, TypeError, WeightUpdateError) as error:  # nobody of ours, or one update late
            with contextlib.suppress(OSError):
                line.say({"failed": str(error) or "this is not the sender of that source"}, 1.0)
            line.close()
            return
        if len(self._known) == self._workers:
            names = ", ".join(other.name for other in self._known)
            with contextlib.suppress(OSError):
                line.say({"failed": f"the sender has its {self._workers} workers already: {names}"}, 1.0)
            line.close()
            raise WeightUpdateError(f"{worker.name} came beside the {self._workers} workers that Sender(workers=…) says: {names}")
        self._known.append(worker)
        self._selector.register(line.socket, selectors.EVENT_READ, worker)

    def _listen_to(self, worker: _Worker) -> None:
        try:
            message = worker.line.hear(self._timeout)
        except (OSError, ValueError) as error:
            raise WeightUpdateError(f"{self._label(worker)} is gone: {error}") from error
        self._take(worker, message)

    def _take(self, worker: _Worker, message: Any) -> None:
        if "failed" in message:
            raise WeightUpdateError(f"{self._label(worker)}: {message['failed']}")
        if message["state"] == "asks" and message["update"] != self._update:
            raise WeightUpdateError(f"update {message['update']} of this sender is over: the present one is {self._update}")
        if worker.state == "done":  # others may not have it yet
            worker.again = True
            return
        worker.state = message["state"]

    def _label(self, worker: _Worker) -> str:
        return f"worker {worker.rank} ({worker.name})" if worker.rank else f"worker ({worker.name})"

    def _lose(self, worker: _Worker, why: str) -> None:
        """Let one worker go while none has a part in anything."""
        with contextlib.suppress(OSError):
            worker.line.say({"failed": why}, 1.0)
        self._known.remove(worker)
        self._release(worker.line)
        self._drop()

    def _forget(self) -> None:
        for line in [worker.line for worker in self._known] + self._strangers:
            self._release(line)
        self._known, self._strangers = [], []
        self._drop()

    def _release(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.close()

    def _drop(self) -> None:
        if self._group is not None:
            self._group.drop()
            self._group = None


class _Member:
    """A worker process's place in a sender's group, kept from one update to the next."""

    def __init__(self, address: str, port: int, token: str, timeout: float) -> None:
        self.key = (address, port, token)
        self.address = address
        self.group: _Group | None = None
        self.sender = f"the sender at {address}:{port}"
        try:
            self.line = _Line(socket.create_connection((address, port), timeout))
        except OSError as error:
            raise WeightUpdateError(f"{self.sender} cannot be reached: {error}") from error
        self.local = self.line.socket.getsockname()[0]

    def say(self, message: dict[str, Any], timeout: float) -> None:
        try:
            self.line.say(message, timeout)
        except OSError as error:
            self.look(0.0)
            raise WeightUpdateError(f"{self.sender} is gone: {error}") from error

    def hear(self, timeout: float) -> dict[str, Any]:
        try:
            message: dict[str, Any] = self.line.hear(timeout)
        except TimeoutError:
            raise WeightUpdateError(f"{self.sender} said nothing for {timeout:g} s") from None
        except (OSError, ValueError) as error:
            raise WeightUpdateError(f"{self.sender} is gone: {error}") from error
        if "failed" in message:
            raise WeightUpdateError(f"{self.sender}: {message['failed']}")
        return message

    def look(self, seconds: float) -> None:
        """While broadcasts run the sender has nothing to say but that something failed."""
        if self.line.waits(seconds):
            self.hear(1.0)

    def leave(self) -> None:
        global _member
        if _member is self:
            _member = None
        self.line.close()
        if self.group is not None:
            self.group.drop()
            self.group = None


_member: _Member | None = None


class Incoming:
    """A worker's side of one update. The tensors are on the host with Gloo, on the worker's GPU with NCCL."""

    rereadable = False

    def __init__(self, source: Mapping[str, Any], device: torch.device, timeout: float) -> None:
        global _member
        try:
            address, port, token, update = (source[key] for key in ("address", "port", "token", "update"))
        except KeyError as error:
            raise WeightUpdateError(f"{dict(source)!r} is not a source of a process group: it has no {error}") from None
        self._device, self._timeout = device, timeout
        if _member is not None and (_member.key != (address, port, token) or _member.line.waits()):
            _member.leave()  # another sender's, or a connection that a failed update ended
        if _member is None:
            _member = _Member(address, port, token, timeout)
        self._member: _Member | None = _member
        try:
            _member.say({"token": token, "worker": _name(), "state": "asks", "update": update}, timeout)
            offer = _member.hear(timeout)
            self._backend, self._bucket = offer["backend"], offer["bucket"]
            _usable(self._backend, device)
            self._items = packing.parse(offer["items"])
        except BaseException as error:
            self._fail(error)
            raise
        self.manifest = packing.manifest_of(self._items)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors as they come, once. Asking for the first is this worker's consent to the manifest: the bytes start
        when all have given theirs. Asking for one more than the last says that all went well here.

        Raises WeightUpdateError: the sender or another worker failed, died or stopped.
        """
        member = self._member
        if member is None:
            raise WeightUpdateError("this update has come in, or failed, before: it is sent once")
        try:
            member.say({"state": "ready"}, self._timeout)
            go = member.hear(self._timeout)["go"]
            if go is not None:
                if member.group is not None:
                    member.group.drop()
                place = member.address, go["port"], None
                member.group = _group(self._backend, place, member.local, go["rank"], go["size"], self._timeout)
            assert member.group is not None
            yield from self._stream(member, member.group)
            member.say({"state": "done"}, self._timeout)
            self._member = None
        except GeneratorExit:  # its user stopped, and closes this update with the reason
            raise
        except BaseException as error:
            self._fail(error)
            raise

    def _stream(self, member: _Member, group: _Group) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        device = self._device if self._backend == "nccl" else torch.device("cpu")
        frames = _frames(self._items, self._bucket)
        buckets = group.buckets(frames, device)
        large: torch.Tensor | None = None

        def receive(number: int) -> tuple[torch.Tensor, Any]:
            nonlocal large
            frame = frames[number]
            if frame.start is None:
                whole, target = (buckets[number % 2],) * 2
            else:
                if frame.start == 0:
                    large = torch.empty(self._items[frame.parts[0][0]].nbytes, dtype=torch.uint8, device=device)
                assert large is not None
                whole, target = large, large[frame.start :]
            return whole, group.broadcast(target[: frame.nbytes]) if frame.nbytes else None

        ahead = receive(0)
        for number, frame in enumerate(frames):
            whole, work = ahead
            if work is not None:
                _finish(work, member.look, self._timeout, f"waiting for {self._items[frame.parts[0][0]].names[0]}")
            if number + 1 < len(frames):
                ahead = receive(number + 1)
            for index, offset in frame.parts:
                item = self._items[index]
                if frame.start is None or frame.start + frame.nbytes == item.nbytes:
                    tensor = packing.view(item, whole[offset:])
                    for name in item.names:
                        yield name, tensor

    def close(self, ok: bool) -> None:
        """An update that has not come in whole is over: tell the sender, with the error under way here if there is one."""
        self._fail(sys.exc_info()[1] or WeightUpdateError("the worker broke the update off"))

    def _fail(self, error: BaseException) -> None:
        if self._member is None:
            return
        member, self._member = self._member, None
        why = str(error) if isinstance(error, WeightUpdateError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            member.line.say({"failed": why}, 1.0)
        member.leave()


def open_source(source: Mapping[str, Any], device: torch.device, timeout: float) -> Incoming:
    """A worker's side of the update that a `Sender` is sending. Every wait is bounded by ``timeout`` seconds.

    Raises WeightUpdateError: the sender cannot be reached, says nothing, has given up, or this process cannot use its backend.
    """
    return Incoming(source, device, timeout)


def leave() -> None:
    """Take this worker process out of its group: it keeps its place for the next update otherwise."""
    if _member is not None:
        _member.leave()


def _usable(backend: str, device: torch.device) -> None:
    import torch.distributed as dist

    if not dist.is_available() or backend not in ("gloo", "nccl"):
        raise WeightUpdateError(f"backend {backend!r} is none of gloo and nccl, or this torch has no torch.distributed")
    if not {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available}[backend]():
        raise WeightUpdateError(f"this torch has no {backend}: choose another backend")
    if backend == "nccl" and device.type != "cuda":
        raise WeightUpdateError(f"backend nccl needs a CUDA device, not {device}: use Sender(backend='gloo')")


def _group(backend: str, *place: Any) -> _Group:
    try:
        return _Group(backend, *place)
    except RuntimeError as error:
        raise WeightUpdateError(f"the {backend} group did not come about: {str(error).splitlines()[0]}") from error


def _listen(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError as error:
        raise WeightUpdateError(f"cannot listen on {address}:{port}: {error}") from error


def _name() -> str:
    import torch.distributed as dist

    rank = f", rank {dist.get_rank()} of its engine" if dist.is_available() and dist.is_initialized() else ""
    return f"{socket.gethostname()} process {os.getpid()}{rank}"
