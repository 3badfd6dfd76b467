"""An isolated environment with one real vLLM release for the CPU.

    python tests/releases/environment.py VERSION FOLDER      prints the Python to run

Releases that share a torch share one copy of it (``FOLDER/torch-<version>``): the older ones come with CUDA libraries of
several gigabytes. Python 3.11 is what the old releases and the new ones have in common.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from packaging.version import Version

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Wheels up to 0.12.0 were linked to a newer libstdc++ than Debian 12 has, and need one symbol of it: (version, stand-in).
_STUBS = (
    ("GLIBCXX_3.4.32", 'extern "C" void _ZSt21ios_base_library_initv() {}'),  # an initializer without effect
    ("CXXABI_1.3.15", '#include <exception>\nextern "C" void __cxa_call_terminate(void*) { std::terminate(); }'),
)
_CUDA_ONLY = ("torch", "triton", "nvidia", "xformers", "flashinfer")


@dataclass(frozen=True)
class Row:
    """One release of `releases.toml`."""

    version: str
    wheel: str
    torch: str
    pins: list[str] = field(default_factory=list)
    live: bool = False

    @property
    def release(self) -> Version:
        return Version(self.version)

    @property
    def engine(self) -> str:
        """What its CPU build runs by default: V1 came to the CPU with 0.9.1."""
        return "V0" if self.release < Version("0.9.1") else "V1"


def rows() -> dict[str, Row]:
    """All releases, oldest first."""
    with (HERE / "releases.toml").open("rb") as file:
        return {row["version"]: Row(**row) for row in tomllib.load(file)["release"]}


def build(row: Row, folder: Path) -> Path:
    """Build the environment, or reuse a finished one. Returns the Python to run, a wrapper that preloads what is needed."""
    env = folder / row.version
    python = env / "bin" / "vpython"
    if python.is_file():
        return python
    tcmalloc = _first("/usr/lib", "*/libtcmalloc_minimal.so.4")
    if Version("0.17.0") <= row.release < Version("0.20.0") and tcmalloc is None:
        raise SystemExit(f"vLLM {row.version} refuses to start without tcmalloc: install it (Debian: libtcmalloc-minimal4)")
    if not row.torch:
        raise SystemExit(f"vLLM {row.version} has no wheel for the CPU: only its sources can be checked")
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    site = next((env / "lib").glob("python*/site-packages"))
    (site / "shared_torch.pth").write_text(f"{_torch(row.torch, folder)}\n")
    with tempfile.TemporaryDirectory() as down:
        _pip(env, "download", "--no-deps", "-d", down, row.wheel)
        wheel = next(Path(down).glob("*.whl"))
        _pip(env, "install", *_requirements(wheel), *row.pins)
        _pip(env, "install", "--no-deps", str(wheel))
    _pip(env, "install", "-e", str(ROOT))
    # Up to 0.16.0 vLLM asks for a distribution of its own name, and sees by its version that it was built for the CPU.
    metadata = site / f"vllm-{row.version}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {row.version}+cpu\n")
    preload = _mend(site / "vllm", env)
    preload += [str(lib) for lib in (tcmalloc, _first(str(env), "lib/libiomp5.so")) if lib]
    python.write_text(
        "#!/bin/sh\n"
        'export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"\n'
        f'export LD_PRELOAD="{":".join(preload)}${{LD_PRELOAD:+:$LD_PRELOAD}}"\n'
        f'exec "{env}/bin/python" "$@"\n'
    )
    python.chmod(0o755)
    return python


def _torch(version: str, folder: Path) -> Path:
    base = folder / f"torch-{version}"
    if not (base / ".ready").is_file():
        shutil.rmtree(base, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(base), f"torch=={version}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        (base / ".ready").touch()
    return base


def _pip(env: Path, *args: str) -> None:
    command = [str(env / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check", *args]
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"pip {args[0]} failed in {env.name}:\n{done.stderr[-3000:]}")


def _requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without torch and its relatives, whose CUDA builds would replace or break this torch."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    wanted = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    return [want for want in wanted if not want.lower().startswith(_CUDA_ONLY)]


def _first(root: str, pattern: str) -> Path | None:
    return next(iter(sorted(Path(root).glob(pattern))), None)


def _mend(package: Path, env: Path) -> list[str]:
    """Let an old release's kernels load beside an older libstdc++. Returns libraries to preload."""
    kernels = package / "_C.abi3.so"
    stubs = [code for version, code in _STUBS if kernels.is_file() and _weaken(kernels, version)]
    if not stubs:
        return []
    library = env / "lib" / "libnewer_stdcxx.so"
    compiler = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
    subprocess.run(compiler, input="\n".join(reversed(stubs)), text=True, check=True)
    return [str(library)]


def _weaken(library: Path, version: str) -> bool:
    """Mark the need for one symbol version as weak. False where the library does not need it."""
    data = bytearray(library.read_bytes())
    (table,) = struct.unpack_from("<Q", data, 40)  # ELF64: section headers
    size, count, _ = struct.unpack_from("<HHH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + size * index) for index in range(count)]
    found = False
    for section in sections:
        if section[1] != 0x6FFFFFFE:  # SHT_GNU_verneed
            continue
        names, need = sections[section[6]][4], section[4]
        while True:
            _, entries, _, first, step = struct.unpack_from("<HHIII", data, need)
            entry = need + first
            for _ in range(entries):
                _, flags, _, name, following = struct.unpack_from("<IHHII", data, entry)
                start = names + name
                if data[start : data.index(0, start)].decode() == version:
                    struct.pack_into("<H", data, entry + 4, flags | 2)  # VER_FLG_WEAK
                    found = True
                entry += following
            if not step:
                break
            need += step
    if found:
        library.write_bytes(data)
    return found


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in rows():
        raise SystemExit(f"usage: environment.py VERSION FOLDER; VERSION one of {', '.join(rows())}")
    folder = Path(sys.argv[2]).resolve()
    os.makedirs(folder, exist_ok=True)
    print(build(rows()[sys.argv[1]], folder))


if __name__ == "__main__":
    main()
