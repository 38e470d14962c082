"""Compiles csrc/ with g++ for the CPU: the extension module, and a driver that sanitizers watch. No CUDA toolkit.

Objects are kept under build/cuda_on_host/, named by a hash of all that goes into them.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

MODEL = Path(__file__).parent
ROOT = MODEL.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"

LANDINGS = ("late", "early", "random")  # cuda_on_host::Landing
SHARED_LIMIT = 227 << 10  # bytes of dynamic shared memory that a block may have at most, on sm_90 and sm_100

MODEL_SOURCES = (
    "asynchronous.cpp", "barriers.cpp", "fibers.cpp", "grid.cpp", "instructions.cpp", "mbarriers.cpp", "operands.cpp",
    "registers.cpp", "shared_memory.cpp", "tensor_maps.cpp", "warpgroup.cpp",
)  # fmt: skip
FLAGS = (
    "-std=c++20", "-g1", "-fPIC", "-pthread",
    "-fno-strict-aliasing",  # kernels read memory in vectors of another type, as nvcc lets them
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-attributes",
    "-Wno-psabi",  # tensor maps as parameters: GCC 4.6 passes them in another way
    "-DMIXER_KERNELS_ON_HOST", f"-I{MODEL}", f"-I{CSRC}",
)  # fmt: skip


class CompileError(RuntimeError):
    """A compiler's complaint, in its own words."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def load() -> ModuleType:
    """The extension module ``mixer_kernels._C`` for the CPU, compiled if need be."""
    return _load(build_module())


@functools.cache
def _load(path: Path) -> ModuleType:
    name = "mixer_kernels_on_host._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextmanager
def machine(seed: int = 0, landing: str = "late", shared_limit: int = SHARED_LIMIT) -> Iterator[None]:
    """The order of threads and blocks, when asynchronous copies land, and how much shared memory a block may have.

    Inside, for the module that ``load()`` returns; the default afterwards.
    """
    configure(ctypes.CDLL(str(build_module())), seed, landing, shared_limit)
    try:
        yield
    finally:
        configure(ctypes.CDLL(str(build_module())))


def launches() -> int:
    """How many kernels the module that ``load()`` returns has launched."""
    return _counter("cuda_on_host_launches")


def matrix_products() -> int:
    """How many products of 16 x 16 by 16 x 8 elements its kernels have executed."""
    return _counter("cuda_on_host_matrix_products")


def warpgroup_products() -> int:
    """How many of those were wgmma's."""
    return _counter("cuda_on_host_warpgroup_products")


def _counter(name: str) -> int:
    counter = getattr(ctypes.CDLL(str(build_module())), name)
    counter.restype = ctypes.c_uint64
    return counter()


def configure(library: ctypes.CDLL, seed: int = 0, landing: str = "late", shared_limit: int = SHARED_LIMIT) -> None:
    library.cuda_on_host_configure(
        ctypes.c_uint64(seed), ctypes.c_int(LANDINGS.index(landing)), ctypes.c_uint64(shared_limit)
    )


@functools.cache
def build_module() -> Path:
    """The path of the extension module."""
    import pybind11

    flags = ["-O2", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    sources = [*sources_of(CSRC), CSRC / "bind.cpp", *model_sources()]
    return build(sources, flags, ["-shared"], "_C" + sysconfig.get_config_var("EXT_SUFFIX"))


def build_samples(sanitizer: str | None = None, name: str = "samples") -> Path:
    """``name``.cu as a program, or without ``sanitizer`` as a library: small kernels, faulty ones among them."""
    sources = [MODEL / f"{name}.cu", CSRC / "errors.cpp", *model_sources()]
    flags = sanitize(sanitizer)
    return build(sources, flags, [*flags, "-rdynamic" if sanitizer else "-shared"], name)


def build_driver(sanitizer: str | None = None, csrc: Path = CSRC, name: str = "driver") -> Path:
    """The path of a program that runs every launcher of ``csrc`` over small shapes: driver.cpp, driver_sm90.cpp.

    ``sanitizer`` is g++'s ``-fsanitize``: "address,undefined" or "thread".
    """
    flags = sanitize(sanitizer)
    sources = [*sources_of(csrc), *model_sources(), MODEL / f"{name}.cpp"]
    return build(sources, flags, [*flags, "-rdynamic"], name, kernel_flags=["-O0"])  # compiling is what takes long


def sanitize(sanitizer: str | None) -> list[str]:
    if sanitizer is None:
        return ["-O1"]
    return ["-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-w"]  # their code gives false warnings


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs what ``build_driver`` or ``build_samples`` built; stdout and stderr together."""
    command = [str(program), *arguments]
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",  # needs ptrace, which containers may forbid; the kernels allocate nothing
        "TSAN_OPTIONS": "atexit_sleep_ms=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }

    def attempt(*prefix: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **options, **environment},
        )

    result = attempt()
    if "unexpected memory mapping" in result.stdout:  # older thread sanitizers, newer kernels: too random addresses
        result = attempt("setarch", "-R")
    return result


def sources_of(csrc: Path) -> list[Path]:
    """All but the bindings."""
    folders = (csrc, csrc / "sm90")
    found = [file for folder in folders for ending in ("*.cu", "*.cpp") for file in sorted(folder.glob(ending))]
    return [file for file in found if file.name != "bind.cpp"]


def model_sources() -> list[Path]:
    return [MODEL / name for name in MODEL_SOURCES]


def build(
    sources: Sequence[Path],
    flags: Sequence[str],
    link_flags: Sequence[str],
    name: str,
    kernel_flags: Sequence[str] = (),  # of .cu files, after flags
    cache: Path = CACHE,
) -> Path:
    """Compiles ``sources``, as many at a time as there are CPUs, and links them into ``cache``/<hash>/``name``.

    Raises CompileError with what the compiler said.
    """

    def command(source: Path) -> list[str]:
        own = kernel_flags if source.suffix == ".cu" else ["-O2"] if source in model_sources() else []
        return [compiler(), *FLAGS, *flags, *own]

    commands = {source: command(source) for source in sources}
    objects = {source: cache / f"{_digest(source, commands[source])}.o" for source in sources}
    link = [compiler(), "-pthread", *link_flags, *map(str, objects.values()), "-o"]
    target = cache / _hash(*link) / name
    if target.exists():
        os.utime(target.parent)
        return target
    _forget_old(cache)
    target.parent.mkdir(parents=True, exist_ok=True)

    with _alone(cache):  # tests run in several processes
        missing = [source for source in sources if not objects[source].exists()]
        for source in sources:
            if source not in missing:
                os.utime(objects[source])
        missing.sort(key=lambda source: -source.stat().st_size)  # the longest first
        progress = _Progress(len(missing), f"compiling {name} for the CPU")
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as workers:

            def compile_one(source: Path) -> None:
                _run([*commands[source], "-x", "c++", "-c", str(source), "-o"], objects[source])
                progress.step(source.name)

            try:
                list(workers.map(compile_one, missing))
            except CompileError:
                workers.shutdown(cancel_futures=True)
                raise
        if not target.exists():
            _run(link, target)
    return target


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time: the next one finds what this one has compiled."""
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_old(cache: Path, days: float = 3) -> None:
    for path in cache.glob("*"):
        with suppress(FileNotFoundError):  # others may forget the same
            if path.stat().st_mtime < time.time() - days * 86400:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _run(command: list[str], output: Path) -> None:
    partial = output.with_name(f"{output.name}.{os.getpid()}.{threading.get_ident()}")  # others may build the same
    result = subprocess.run([*command, str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)} {output}\n{result.stdout}{result.stderr}")
    partial.replace(output)


@functools.cache
def _version(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def _digest(source: Path, command: Sequence[str]) -> str:
    """Of all that makes an object, except where the sources lie: copies of the tree have the same."""
    files = [source]
    for file in files:
        for header in re.findall(r'^\s*#include "(.+)"', file.read_text(), re.MULTILINE):
            found = next((folder / header for folder in (file.parent, MODEL, CSRC) if (folder / header).exists()), None)
            if found is not None and found.resolve() not in map(Path.resolve, files):
                files.append(found)
    options = [word.replace(str(ROOT), "") for word in command]
    return _hash(_version(command[0]), *options, source.name, *(file.read_text() for file in files))


def _hash(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()[:24]


class _Progress:
    def __init__(self, total: int, what: str) -> None:
        self.total, self.what, self.done, self.lock = total, what, 0, threading.Lock()

    def step(self, name: str) -> None:
        with self.lock:
            self.done += 1
            print(f"{self.what}: {self.done}/{self.total} {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(build_module())
