"""Prefix caching per weight version: who is pinned to which version and when, on the two layouts that vLLM's releases have."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import pytest
from packaging.version import Version

from vllm_compat import releases, settings
from vllm_compat.behaviors import ALL, no_prefix_caching
from vllm_compat.behaviors._common import V0_RELEASES
from vllm_compat.patching import replace
from vllm_compat.patching.model import CheckFailed, State
from vllm_compat.resolve import resolve, within
from vllm_compat.weights import version

BLOCK = 4


def hashed(request, tokens: list[int], known: list[int]) -> list[int]:
    """The hashes of a request's full blocks that are not known yet: a chain, with the salt in its first block."""
    found = list(known)
    for start in range(len(found) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        salt = request.cache_salt if start == 0 else None
        found.append(hash((found[-1] if found else None, tuple(tokens[start : start + BLOCK]), salt)))
    return found[len(known) :]


def layout(early: bool) -> ModuleType:
    """A library with vLLM's two classes: a request that carries its hashes (from 0.10.1), or a manager that keeps them."""

    class Request:
        def __init__(self, request_id: str, tokens: list[int], cache_salt: str | None = None) -> None:
            self.request_id, self.cache_salt, self.tokens, self.hashings = request_id, cache_salt, [], 0
            if early:
                self.block_hashes: list[int] = []
            self.append_output_token_ids(tokens)

        def append_output_token_ids(self, token_ids: list[int]) -> None:
            self.tokens.extend(token_ids)
            if early:
                self.hashings += not self.block_hashes
                self.block_hashes.extend(hashed(self, self.tokens, self.block_hashes))

    class KVCacheManager:
        enable_caching, prefix_cache_stats = True, None

        def __init__(self) -> None:
            if not early:
                self.req_to_block_hashes: dict[str, list[int]] = {}

        def get_computed_blocks(self, request: Request) -> list[int]:
            if early:
                return list(request.block_hashes)
            if request.request_id not in self.req_to_block_hashes:
                request.hashings += 1
                self.req_to_block_hashes[request.request_id] = hashed(request, request.tokens, [])
            return list(self.req_to_block_hashes[request.request_id])

    library = ModuleType("library")
    library.Request, library.KVCacheManager = Request, KVCacheManager
    return library


@pytest.fixture(params=[True, False], ids=["hashed when made", "hashed when admitted"])
def plain(request) -> ModuleType:
    """A library without our patches."""
    return layout(request.param)


@pytest.fixture
def library(plain: ModuleType) -> ModuleType:
    """The same with them."""
    for patch in no_prefix_caching.BEHAVIOR.patches():
        replace.install(plain, patch, None)
    return plain


@pytest.fixture(autouse=True)
def _weights(monkeypatch):
    """This process holds no engine: its weight version is the test's."""
    monkeypatch.setattr(version, "_current", 0)


def test_requests_meet_within_a_version_only(library):
    """The same tokens have the same hashes until the weights change, and every block's hash is another one after."""
    manager, tokens = library.KVCacheManager(), list(range(3 * BLOCK + 1))
    first, second = (manager.get_computed_blocks(library.Request(name, tokens)) for name in "ab")
    assert first == second
    assert len(first) == 3
    version.advance(1)
    third, fourth = (manager.get_computed_blocks(library.Request(name, tokens)) for name in "cd")
    assert third == fourth
    assert set(third).isdisjoint(first)


def test_a_request_that_waited_is_hashed_again(library):
    """Made, or already tried, under older weights: what it looks for is what new requests look for, and it is hashed once more
    for an update, not for a try."""
    manager, tokens = library.KVCacheManager(), list(range(2 * BLOCK))
    made, tried = library.Request("made", tokens), library.Request("tried", tokens)
    manager.get_computed_blocks(tried)
    version.advance(3)
    new = manager.get_computed_blocks(library.Request("new", tokens))
    assert manager.get_computed_blocks(made) == manager.get_computed_blocks(tried) == new
    hashings = tried.hashings
    assert manager.get_computed_blocks(tried) == new
    assert tried.hashings == hashings


def test_a_running_request_stays_with_its_version(library):
    """Blocks that fill up after an update belong to the old chain; preempted, the request starts under the new weights."""
    manager, tokens = library.KVCacheManager(), list(range(BLOCK - 1))
    running = library.Request("running", tokens)
    assert manager.get_computed_blocks(running) == []
    version.advance(1)
    running.append_output_token_ids([7, 8])  # its first block fills up: a part of it was written by older weights
    salt = running.cache_salt
    if hasattr(running, "block_hashes"):
        assert running.block_hashes == hashed(SimpleNamespace(cache_salt=salt), running.tokens, [])
    again = library.Request("again", running.tokens)
    assert again.cache_salt != salt
    found = manager.get_computed_blocks(again)
    assert found
    assert found != hashed(running, running.tokens, [])
    assert manager.get_computed_blocks(running) == found  # preempted
    assert running.cache_salt == again.cache_salt


def test_the_users_salt_stays_his(library):
    """A salt keeps users apart as before, also one that looks like ours, and survives updates."""
    manager, tokens = library.KVCacheManager(), list(range(BLOCK))

    def blocks(name: str, salt: str | None) -> tuple[int, ...]:
        return tuple(manager.get_computed_blocks(library.Request(name, tokens, cache_salt=salt)))

    salts = (None, "a", "b", "weights 0", "weights 0, a", "0", "0, a")
    assert len({blocks(f"{salt}", salt) for salt in salts}) == len(salts)
    waiting = library.Request("waiting", tokens, cache_salt="a")
    for now in (1, 2):
        version.advance(now)
        assert tuple(manager.get_computed_blocks(waiting)) == blocks(f"a{now}", "a") != blocks(f"b{now}", "b")


def core(library: ModuleType, **more: object) -> SimpleNamespace:
    """An engine core, as far as the check looks."""
    scheduler = SimpleNamespace(kv_cache_manager=library.KVCacheManager(), block_size=BLOCK, connector=None)
    scheduler.__dict__.update(more)
    return SimpleNamespace(scheduler=scheduler)


@pytest.fixture
def check(monkeypatch):
    """The check of the mode; the request that it makes up is the library's."""

    def run(library: ModuleType, **more: object) -> str:
        monkeypatch.setattr(no_prefix_caching, "_made_up", lambda core: library.Request("vllm_compat", [0] * 3 * BLOCK))
        (found,) = (check for check in no_prefix_caching.BEHAVIOR.checks if check.modes == ("per_version",))
        return found.run(core(library, **more))

    return run


def test_the_check_sees_hashes_change(check, library):
    """It says what it saw, at any version, and leaves nothing behind."""
    assert check(library) == "under weight version 0 a prompt's 3 blocks have other hashes than under -1"
    version.advance(5)
    assert "version 5" in check(library)
    found = core(library)
    no_prefix_caching._per_version(found)
    assert not getattr(found.scheduler.kv_cache_manager, "req_to_block_hashes", None)


def test_the_check_fails_without_a_patch(check, plain):
    """Neither patch in place, or one of them: refused, whichever it is."""
    with pytest.raises(CheckFailed, match="not pinned"):
        check(plain)
    request, lookup = no_prefix_caching.BEHAVIOR.patches()
    entry = replace.install(plain, lookup, None)
    with pytest.raises(CheckFailed, match="not pinned"):
        check(plain)
    assert replace.undo(entry)
    replace.install(plain, request, None)
    with pytest.raises(AttributeError, match="__wrapped__"):
        check(plain)


def test_the_check_fails_where_the_salt_is_not_hashed(check, library, monkeypatch):
    """A library that ignores the salt, or looks for blocks by something else than the request's hashes, is refused."""
    monkeypatch.setattr(no_prefix_caching, "_salt", lambda given, version: "the same")
    with pytest.raises(CheckFailed, match="same hash under two weight versions"):
        check(library)


@pytest.mark.parametrize("name", ["connector", "aux_output_connector"])
def test_blocks_from_outside_are_refused_by_name(check, library, name):
    """What keeps blocks outside the engine does so by keys of its own."""
    with pytest.raises(CheckFailed, match=r"SimpleNamespace keeps blocks outside .*VLLM_COMPAT_NO_PREFIX_CACHING=1"):
        check(library, **{name: SimpleNamespace()})


def test_without_caching_nothing_is_shared(check, library, monkeypatch):
    """Switched off by the user, or by vLLM for a model: as on V0."""
    monkeypatch.setattr(library.KVCacheManager, "enable_caching", False)
    assert "no block is shared" in check(library)


@pytest.mark.parametrize("release", releases.rows())
def test_which_releases_have_it(release):
    """From 0.9.0 on both of V1's runners, by patches alone, whatever the user's argument; else it is refused, not ignored."""
    known = Version(release)
    for runner in ("v1", "v2", "v0"):
        if runner == "v0" and not within(known, V0_RELEASES):
            continue
        for user in ({}, {"enable_prefix_caching": True}, {"enable_prefix_caching": False}):
            found = resolve(ALL, version=known, runner=runner, environment={"no_prefix_caching": "per_version"}, user=user)[
                "no_prefix_caching"
            ]
            if runner == "v0" or known < Version("0.9.0"):
                assert found.state is State.UNSUPPORTED
                continue
            assert (found.state, found.mode, found.sets) == (State.PENDING, "per_version", ())
            assert found.patches == ("pinned_request", "pinned_lookup")


@pytest.mark.parametrize(
    ("value", "state", "mode"),
    [
        ("1", State.NATIVE, "v0"),
        ("v0", State.NATIVE, "v0"),
        ("per_version", State.PENDING, "per_version"),
        ("v1", State.DISABLED, ""),
        ("0", State.DISABLED, ""),
    ],
)
def test_the_switch(monkeypatch, value, state, mode):
    """V0 is the default; a mode is chosen by its word, and 0 is vLLM's own caching."""
    monkeypatch.setenv("VLLM_COMPAT_NO_PREFIX_CACHING", value)
    choice = settings.load().no_prefix_caching
    found = resolve(ALL, version=Version("0.32.0"), runner="v1", environment={"no_prefix_caching": choice})["no_prefix_caching"]
    assert (found.state, found.mode) == (state, mode)
