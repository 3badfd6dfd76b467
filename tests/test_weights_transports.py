"""The transports of weights, between real processes: values to the bit, and what each says when something breaks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from vllm_compat.errors import WeightUpdateError
from vllm_compat.weights.transports import process_group, shared_memory

CPU = torch.device("cpu")
TRANSPORTS = {"shared_memory": shared_memory, "process_group": process_group}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every kind of tensor a checkpoint may hold. ``large`` is several of the tests' buckets."""
    draw = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    tensors = {
        "scalar": torch.tensor(1.5 + seed),
        "embedding": random(65, 33),
        "large": random(300, 100),
        "turned": random(31, 7).t(),
        "bfloat16": random(129).bfloat16(),
        "empty": torch.zeros(0, 3),
        "float16": random(5, 5).half(),
        "float8": random(17, 3).to(torch.float8_e4m3fn),
        "int8": torch.randint(-128, 127, (41,), generator=draw, dtype=torch.int8),
        "sliced": random(10, 10)[:, 3:7],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-42]),
        "last": random(1),
    }
    return {**tensors, "tied": tensors["embedding"]}


def seen(name: str, tensor: torch.Tensor) -> tuple[str, str, tuple[int, ...], str]:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return name, str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest()


def exact(tensors: dict[str, torch.Tensor]) -> set[tuple]:
    return {seen(*pair) for pair in tensors.items()}


def load(source: dict, wish: dict) -> tuple:
    incoming = TRANSPORTS[source["transport"]].open_source(source, CPU, wish.get("timeout", 20.0))
    found = []
    try:
        if "refuse" in wish:
            raise WeightUpdateError(wish["refuse"])
        for name, tensor in incoming.tensors():
            assert incoming.manifest[name] == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if name == wish.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
            if name == wish.get("stall"):
                time.sleep(wish["seconds"])
            if name == wish.get("dislike"):
                raise WeightUpdateError(f"{name} is not finite")
            found.append(seen(name, tensor))
        if incoming.rereadable:
            assert [seen(*pair) for pair in incoming.tensors()] == found
    except BaseException:
        incoming.close(False)
        raise
    incoming.close(True)
    return set(found), list(incoming.manifest), torch.distributed.is_initialized()


def worker(pipe) -> None:
    """A worker process: loads each source it is sent, and answers what it saw, or the error."""
    torch.set_num_threads(1)
    while (order := pipe.recv()) is not None:
        try:
            pipe.send(load(*order))
        except BaseException as error:
            pipe.send((f"{type(error).__name__}: {error}", None, None))


class Workers:
    def __init__(self, count: int) -> None:
        self.processes, self.pipes = [None] * count, [None] * count
        for index in range(count):
            self.replace(index)

    def replace(self, index: int) -> None:
        if self.processes[index] is not None:
            self.processes[index].kill()
            self.processes[index].join()
        context = multiprocessing.get_context("spawn")
        self.pipes[index], theirs = context.Pipe()
        self.processes[index] = context.Process(target=worker, args=(theirs,), daemon=True)
        self.processes[index].start()
        theirs.close()

    def start(self, source: dict, *wishes: dict) -> None:
        source = json.loads(json.dumps(source))  # it travels as JSON
        for pipe, wish in zip(self.pipes, wishes or [{}] * len(self.pipes)):
            pipe.send((source, wish))

    def answer(self, index: int):
        assert self.pipes[index].poll(60), "no answer from the worker"
        return self.pipes[index].recv()

    def load(self, source: dict, *wishes: dict) -> list:
        self.start(source, *wishes)
        return [self.answer(index) for index in range(len(wishes or self.pipes))]


@pytest.fixture(scope="module")
def workers():
    made = Workers(2)
    yield made
    for process in made.processes:
        process.kill()
        process.join()


def segments() -> set[str]:
    return {name for name in os.listdir(shared_memory.FOLDER) if name.startswith(f"vllm_compat-weights-{os.getpid()}-")}


@pytest.fixture
def sender():
    with process_group.Sender(2, backend="gloo", bucket=10_000, timeout=20.0) as made:
        yield made


def test_shared_memory_is_exact(workers):
    """Two processes read two updates from the same memory to the bit, tied tensors under each name; then it is gone."""
    with shared_memory.Publisher() as publisher:
        for seed in (1, 2):
            with publisher.publish(weights(seed)) as source:
                for found, manifest, _ in workers.load(source):
                    assert found == exact(weights(seed)), found
                    assert set(manifest) == set(weights())
                assert segments() == {source["segment"], source["segment"].rpartition("-")[0]}
    assert not segments()


def test_shared_memory_holds_tied_tensors_once():
    """The segment grows by a name, not by the bytes."""
    tensor = torch.zeros(100_000)
    with shared_memory.publish({"a": tensor}) as one, shared_memory.publish({"a": tensor, "b": tensor}) as two:
        assert two["bytes"] - one["bytes"] < 1_000


def test_a_reader_cannot_change_the_segment():
    """What one reader does to a tensor, another does not see."""
    with shared_memory.publish({"a": torch.ones(1000)}) as source:
        first = shared_memory.open_source(source, CPU, 1.0)
        for _, tensor in first.tensors():
            tensor.zero_()
        (read,) = [tensor.sum().item() for _, tensor in shared_memory.open_source(source, CPU, 1.0).tensors()]
    assert read == 1000


@pytest.mark.parametrize("ends", ["truncated", "header", "bytes", "manifest", "other", "over"])
def test_a_damaged_segment_is_an_error(ends):
    """Cut off, not sealed, other bytes, another manifest, another update, or gone: each says so, before or at the tensor."""
    tensors = {"first": torch.ones(100), "second": torch.ones(100)}
    with shared_memory.Publisher() as publisher, publisher.publish(tensors) as source:
        path = Path(shared_memory.FOLDER, source["segment"])
        raw = bytearray(path.read_bytes())
        match ends:
            case "truncated":
                os.truncate(path, len(raw) - 400)
                expected = "cut off: "
            case "header":
                raw[:8] = bytes(8)
                expected = "not sealed"
            case "bytes":
                raw[-300] ^= 1
                expected = "second: the bytes in shared memory .* do not have their checksum"
            case "manifest":
                raw[shared_memory.HEADER.size + 5] ^= 1
                expected = "damaged: its manifest"
            case "other":
                source = {**source, "nonce": "00" * 16}
                expected = "another update"
            case "over":
                publisher.close()
                expected = "cannot be opened .*: the trainer's block is over"
        if ends in ("header", "bytes", "manifest"):
            with path.open("r+b") as file:
                file.write(raw)
        names: list[str] = []
        with pytest.raises(WeightUpdateError, match=expected):
            names.extend(name for name, _ in shared_memory.open_source(source, CPU, 1.0).tensors())
        assert names == (["first"] if ends == "bytes" else [])


def test_memory_is_written_again_when_nobody_reads_it():
    """A reader keeps the update it opened while the next is published elsewhere; then the memory serves again, and an old source
    does not."""
    with shared_memory.Publisher() as publisher:
        with publisher.publish({"a": torch.zeros(9), "b": torch.zeros(9)}) as old:
            reader = shared_memory.open_source(old, CPU, 1.0)
        with publisher.publish({"a": torch.ones(9), "b": torch.ones(9)}) as new:
            assert new["segment"] != old["segment"]
            assert [tensor.sum().item() for _, tensor in reader.tensors()] == [0, 0]
        reader.close(True)
        del reader
        with publisher.publish({"a": torch.ones(9), "b": torch.ones(9)}) as again:
            assert again["segment"] == old["segment"]
            assert len(segments()) == 2  # it and the publisher's own
            with pytest.raises(WeightUpdateError, match="another update than this source's"):
                shared_memory.open_source(old, CPU, 1.0)


def publish_and_hang(pipe, half: bool) -> None:
    def some():
        yield "a", torch.ones(1000)
        if half:
            pipe.send(None)
            time.sleep(600)
        yield "b", torch.ones(1000)

    with shared_memory.publish(some(), {"a": ((1000,), "float32"), "b": ((1000,), "float32")}) as source:
        pipe.send(source)
        time.sleep(600)


def test_segments_of_killed_trainers():
    """Killed half-way, it is not sealed; killed later, it still reads; the next publication removes both, and no other's."""
    context = multiprocessing.get_context("spawn")
    started = []
    for half in (True, False):
        ours, theirs = context.Pipe()
        process = context.Process(target=publish_and_hang, args=(theirs, half), daemon=True)
        process.start()
        started.append((process, ours))
    (cut, _), (whole, _) = started
    assert all(pipe.poll(60) for _, pipe in started)
    source = [pipe.recv() for _, pipe in started][1]
    left = [name for name in os.listdir(shared_memory.FOLDER) if name.startswith(f"vllm_compat-weights-{cut.pid}-")]
    name = max(left, key=len)
    assert len(left) == 2
    cut.kill()
    cut.join()
    size = Path(shared_memory.FOLDER, name).stat().st_size
    half = {**source, "segment": name, "bytes": size}
    with pytest.raises(WeightUpdateError, match="not sealed"):
        shared_memory.open_source(half, CPU, 1.0)
    with shared_memory.publish({"a": torch.ones(1)}):
        assert not [name for name in left if Path(shared_memory.FOLDER, name).exists()]
        assert Path(shared_memory.FOLDER, source["segment"]).exists()  # its trainer lives
    whole.kill()
    whole.join()
    assert len(list(shared_memory.open_source(source, CPU, 1.0).tensors())) == 2
    with shared_memory.publish({"a": torch.ones(1)}):
        assert not Path(shared_memory.FOLDER, source["segment"]).exists()


def test_no_room_for_a_segment():
    """More than /dev/shm can ever hold: an error that says how much is free, and nothing is left."""
    with (
        pytest.raises(WeightUpdateError, match=r"no room for an update of [\d,]+ bytes \([\d,]+ of [\d,]+ are free\)"),
        shared_memory.publish({"a": torch.zeros(1).expand(1 << 50)}),
    ):
        pytest.fail("published")
    assert not segments()


def test_a_block_that_raises_leaves_no_segment():
    """The error goes on as it is."""
    with pytest.raises(KeyError, match="mine"), shared_memory.publish(weights()):
        raise KeyError("mine")
    assert not segments()


@contextlib.contextmanager
def begin(transport: str, tensors, manifest, **options):
    if transport == "shared_memory":
        with shared_memory.publish(tensors, manifest, **options) as source:
            yield source
    else:
        with process_group.Sender(1, timeout=5.0, **options) as made, made.send(tensors, manifest) as source:
            yield source


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_cannot_be_sent(transport):
    """Every tensor that is none, sharded, without data, named twice or not as promised is named before anybody can load."""
    one, two = ("a", torch.ones(2)), ("b", torch.ones(2))
    promise = {"a": ((2,), "float32"), "b": ((2,), torch.float32)}

    class DTensor(torch.Tensor):
        def full_tensor(self): ...

    wrong = [
        ([one, ("b", 3)], None, {}, "'b': an update consists of names and tensors, not of int"),
        ([one, ("b", torch.ones(2, device="meta"))], None, {}, "b has no plain data"),
        ([one, ("b", torch.ones(2).to_sparse())], None, {}, "b has no plain data"),
        ([one, ("b", torch.ones(2).as_subclass(DTensor))], None, {}, "b is a DTensor"),
        ([one, ("b", torch.ones(2, dtype=torch.complex64))], None, {}, "complex64 is not a dtype"),
        ([one, one], None, {}, "a is given twice"),
        ([], None, {}, "holds no tensor"),
        ([], {}, {}, "holds no tensor"),
        ([], {"a": ((2,), "float33")}, {}, "'float33' is not a dtype"),
        ([], {"a": ((-2,), "float32")}, {}, r"a has the shape \(-2,\)"),
        ([one], None, {"dtype": "int8"}, "is not a floating dtype"),
    ]
    late = [
        ([one], promise, {}, "the tensors ended where the manifest has b"),
        ([two, one], promise, {}, "b came where the manifest has a"),
        ([one, ("b", torch.ones(3))], promise, {}, r"b is float32 \(3,\), but the manifest promised float32 \(2,\)"),
        ([one, two], promise, {"dtype": "bfloat16"}, "a is bfloat16"),
        ([one, two, ("c", torch.ones(1))], promise, {}, "c came after the manifest's last tensor"),
    ]
    for tensors, manifest, options, sentence in wrong + (late if transport == "shared_memory" else []):
        with contextlib.ExitStack() as stack, pytest.raises(WeightUpdateError, match=sentence):
            stack.enter_context(begin(transport, iter(tensors), manifest, **options))
    assert not segments()


def test_a_process_group_is_exact(workers, sender):
    """Three ranks, updates in a row over one group, tensors larger than a bucket: to the bit, and no default group is made."""
    made = []
    for seed in (1, 2, 3):
        with sender.send(weights(seed)) as source:
            answers = workers.load(source)
        made.append(sender._group)
        for found, manifest, default_group in answers:
            assert found == exact(weights(seed)), found
            assert set(manifest) == set(weights())
            assert default_group is False
    assert made[0] is not None
    assert made[0] is made[1] is made[2]


def test_tensors_that_come_one_at_a_time(workers):
    """With a manifest each tensor is asked for when its turn has come; `dtype` casts floats, but no 8-bit ones and no integers."""
    tensors = {name: tensor for name, tensor in weights().items() if name != "tied"}
    cast = {n: t.bfloat16() if t.is_floating_point() and t.dtype.itemsize > 1 else t for n, t in tensors.items()}
    manifest = {name: (tensor.shape, tensor.dtype) for name, tensor in cast.items()}
    with shared_memory.publish(iter(tensors.items()), manifest, dtype="bfloat16") as source:
        assert [answer[0] for answer in workers.load(source)] == [exact(cast)] * 2
    with (
        process_group.Sender(2, dtype=torch.bfloat16, bucket=10_000) as made,
        made.send(iter(tensors.items()), manifest) as source,
    ):
        answers = workers.load(source)
    assert [answer[0] for answer in answers] == [exact(cast)] * 2


def attempt(sender: process_group.Sender, act, *what):
    with sender.send(*(what or (weights(),))) as source:
        return act(source)


def good(workers: Workers, sender: process_group.Sender) -> None:
    answers = attempt(sender, workers.load, weights(9))
    assert [answer[0] for answer in answers] == [exact(weights(9))] * 2


def test_a_worker_that_refuses_the_manifest(workers, sender):
    """The sender names it and its reason, nothing is sent, the other worker hears of it, and the next update goes well."""
    good(workers, sender)
    answers = []
    with pytest.raises(WeightUpdateError, match=r"worker \d .* process \d+\): layer.7 is unknown"):
        attempt(sender, lambda source: answers.extend(workers.load(source, {"refuse": "layer.7 is unknown"}, {})))
    refused, told = answers
    assert refused[0] == "WeightUpdateError: layer.7 is unknown"
    assert "layer.7 is unknown" in told[0]
    good(workers, sender)


def test_a_worker_that_comes_after_the_failure(workers, sender):
    """While the trainer's block runs it is told at once, instead of waiting for a sender that has given up."""
    good(workers, sender)
    answers = []

    def act(source):
        workers.pipes[0].send((source, {"refuse": "layer.7 is unknown"}))
        answers.append(workers.answer(0))
        time.sleep(0.5)
        begun = time.monotonic()
        workers.pipes[1].send((source, {}))
        answers.append(workers.answer(1))
        assert time.monotonic() - begun < 5

    with pytest.raises(WeightUpdateError, match=r"process \d+\): layer.7 is unknown"):
        attempt(sender, act)
    assert "layer.7 is unknown" in answers[1][0]
    good(workers, sender)


def test_a_source_is_loaded_once(workers, sender):
    """A second load of the same update is an error in the worker at once; the next update goes well."""

    def act(source):
        assert [answer[0] for answer in workers.load(source)] == [exact(weights())] * 2
        return workers.load(source)

    assert all("a source is loaded once" in answer[0] for answer in attempt(sender, act))
    good(workers, sender)


def test_a_worker_that_breaks_off(workers, sender):
    """What a worker finds wrong in a tensor reaches the sender and the other worker; the next update goes well."""
    answers = []
    with pytest.raises(WeightUpdateError, match=r"worker \d .* process \d+\): scalar is not finite"):
        attempt(
            sender,
            lambda source: answers.extend(workers.load(source, {"dislike": "scalar"}, {"stall": "scalar", "seconds": 0.5})),
        )
    assert answers[0][0] == "WeightUpdateError: scalar is not finite"
    assert "scalar is not finite" in answers[1][0]
    good(workers, sender)


def test_a_worker_killed_half_way(workers, sender):
    """The sender names its process at once; with its successor the next update goes well."""
    good(workers, sender)
    victim = workers.processes[1].pid

    def act(source):
        workers.start(source, {}, {"die": "large"})
        workers.answer(0)
        workers.processes[1].join()

    begun = time.monotonic()
    with pytest.raises(WeightUpdateError, match=rf"process {victim}\) is gone"):
        attempt(sender, act)
    assert time.monotonic() - begun < 10
    workers.replace(1)
    good(workers, sender)


def test_a_worker_replaced_between_updates(workers, sender):
    """No update is lost: the group is made anew with the new process."""
    good(workers, sender)
    workers.replace(0)
    good(workers, sender)


def test_a_worker_that_stops(workers):
    """Sender and other worker wait no longer than their timeout, and say for what or whom; then all goes on."""
    stalled = {"timeout": 1.0, "stall": "scalar", "seconds": 2.5}
    with process_group.Sender(2, bucket=10_000, timeout=1.0) as made:
        begun = time.monotonic()
        with pytest.raises(WeightUpdateError, match="large: no progress for 1 s"):
            attempt(made, lambda source: workers.load(source, {"timeout": 1.0}, stalled))
        assert time.monotonic() - begun < 8
        good(workers, made)


def test_workers_that_do_not_come(workers):
    """The sender says how many; those that came hear it."""
    answers = []
    with process_group.Sender(3, timeout=1.0) as made:
        with pytest.raises(WeightUpdateError, match="1 of 3 workers, which did not come"):
            attempt(made, lambda source: answers.extend(workers.load(source)))
    assert all("did not come" in answer[0] for answer in answers)


def test_a_worker_too_many(workers):
    """A group of fewer workers than come is refused: one engine would keep its old weights."""
    answers = []

    def act(source):
        workers.start(source, {"stall": "scalar", "seconds": 1.0}, {"stall": "scalar", "seconds": 1.0})
        answers.extend((workers.answer(0), workers.answer(1)))

    with process_group.Sender(1, timeout=20.0) as made:
        with pytest.raises(WeightUpdateError, match=r"beside the 1 workers that Sender\(workers=…\) says"):
            attempt(made, act)
    assert any("has its 1 workers already" in str(answer[0]) for answer in answers)


def send_and_hang(pipe) -> None:
    def some():
        yield "a", torch.ones(100_000)
        pipe.send(None)
        time.sleep(600)

    manifest = {"a": ((100_000,), "float32"), "b": ((100_000,), "float32")}
    with process_group.Sender(2, bucket=10_000).send(some(), manifest) as source:
        pipe.send(source)
        time.sleep(600)


def test_a_sender_killed_half_way(workers, sender):
    """Every worker says so at once, whatever its timeout, and takes part in another sender's update."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=send_and_hang, args=(theirs,), daemon=True)
    process.start()
    assert pipe.poll(60)
    workers.start(pipe.recv())
    assert pipe.poll(60)  # half of it is out
    killed = time.monotonic()
    process.kill()
    for index in range(2):
        assert re.match(r"WeightUpdateError: the sender at 127.0.0.1:\d+ is gone", workers.answer(index)[0])
    assert time.monotonic() - killed < 5
    process.join()
    good(workers, sender)


def test_a_tensor_that_is_not_as_promised_half_way(workers, sender):
    """The sender and every worker name it; the next update goes well."""
    good(workers, sender)
    answers = []
    pairs = [("a", torch.ones(100_000)), ("b", torch.ones(3))]
    manifest = {"a": ((100_000,), "float32"), "b": ((2,), "float32")}
    with pytest.raises(WeightUpdateError, match="b is float32"):
        attempt(sender, lambda source: answers.extend(workers.load(source)), iter(pairs), manifest)
    assert all("b is float32 (3,)" in answer[0] for answer in answers)
    good(workers, sender)


def test_a_block_that_raises_stops_the_sending(workers, sender):
    """The trainer's own error goes on, and workers that wait hear of it."""

    def act(source):
        workers.pipes[0].send((source, {}))
        time.sleep(2.0)  # it has joined, and waits for the other
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attempt(sender, act)
    assert "the trainer's block raised KeyError" in workers.answer(0)[0]
    good(workers, sender)


def test_a_process_ends_at_once_after_a_failure(run_python):
    """Broadcasts that nobody will finish keep neither sender nor worker from ending, and from ending well."""
    ran = run_python(
        """
        import threading, time, torch
        from vllm_compat.weights.transports import process_group

        sender = process_group.Sender(1, bucket=1000, timeout=60.0)
        taken = threading.Event()

        def load(source):
            for _ in process_group.open_source(source, torch.device("cpu"), 60.0).tensors():
                taken.set()
                time.sleep(600)

        try:
            with sender.send({"a": torch.ones(10_000), "b": torch.ones(10_000)}) as source:
                threading.Thread(target=load, args=(source,), daemon=True).start()
                assert taken.wait(30)
                raise KeyError("mine")
        except KeyError:
            print("RESULT", time.time())
        """,
        environment={"VLLM_COMPAT_PROFILE": "off"},
    ).ok()
    assert time.time() - ran.result < 5


def test_who_does_not_belong(workers, sender):
    """Noise, another token and an update that is over are turned away, and the update under way goes well."""
    with sender.send(weights()) as old:
        workers.load(old)
    with sender.send(weights()) as source, socket.create_connection(("127.0.0.1", source["port"])) as noise:
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(0.1)
        with pytest.raises(WeightUpdateError, match="not the sender of that source"):
            process_group.open_source({**source, "token": "0" * 32}, CPU, 5.0)
        with pytest.raises(WeightUpdateError, match="update 1 of this sender is over: the present one is 2"):
            process_group.open_source(old, CPU, 5.0)
        answers = workers.load(source)
    assert [answer[0] for answer in answers] == [exact(weights())] * 2


def test_a_sender_takes_itself_down():
    """After `close` its port is free, its threads are gone, and a source of it says that it cannot be reached."""
    with process_group.Sender(1, timeout=5.0) as made:
        with pytest.raises(WeightUpdateError, match="one at a time"), made.send(weights()) as source, made.send(weights()):
            pass
    with contextlib.closing(socket.create_server(("127.0.0.1", source["port"]))):
        assert not [thread for thread in threading.enumerate() if thread.name == "vllm_compat-send-weights"]
    with pytest.raises(WeightUpdateError, match=r"the sender at 127.0.0.1:\d+ cannot be reached"):
        process_group.open_source(source, CPU, 1.0)
    with pytest.raises(WeightUpdateError, match="this sender is closed"), made.send(weights()):
        pytest.fail("closed")


def test_backends_that_cannot_be():
    """Unknown, without its device, or a port in use: each is one clear error when the sender is made."""
    with pytest.raises(WeightUpdateError, match="backend 'mpi' is none of gloo and nccl"):
        process_group.Sender(1, backend="mpi")
    with pytest.raises(WeightUpdateError, match="nccl"):
        process_group.Sender(1, backend="nccl", device="cpu")
    with process_group.Sender(1) as made, made.send(weights()) as source:
        with pytest.raises(WeightUpdateError, match=f"cannot listen on 127.0.0.1:{source['port']}"):
            process_group.Sender(1, port=source["port"])
        answer = process_group.open_source(source, CPU, 5.0)
        list(answer.tensors())
        answer.close(True)
    process_group.leave()
