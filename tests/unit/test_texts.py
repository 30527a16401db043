"""The texts that come with the package: complete, unchanged, named in the licence file."""

import hashlib
import lzma
import re
from importlib import resources

import pytest

from memzoo.train.data.texts import Document, list_texts, load_text

FOLDER = resources.files("memzoo.train.data.texts")


@pytest.mark.parametrize(
    ("name", "num_documents", "first_title", "last_title"),
    [
        ("emma", 1, "Emma", "Emma"),
        ("moby_dick", 1, "Moby-Dick; or, The Whale", "Moby-Dick; or, The Whale"),
        ("state_of_the_union", 200, "1790 George Washington", "1988 Ronald Reagan"),
        ("state_of_the_union_heldout", 33, "1989 George Bush", "2021 Joseph R Biden"),
    ],
)
def test_documents(name: str, num_documents: int, first_title: str, last_title: str) -> None:
    documents = load_text(name)
    assert len(documents) == num_documents
    assert (documents[0].title, documents[-1].title) == (first_title, last_title)
    assert all(isinstance(document, Document) and len(document.text) > 1000 for document in documents)
    assert all(document.text == document.text.strip() for document in documents)


def test_held_out_addresses_are_not_among_the_training_ones() -> None:
    seen = {document.text for document in load_text("state_of_the_union")}
    assert seen.isdisjoint(document.text for document in load_text("state_of_the_union_heldout"))


def test_novels_are_whole() -> None:
    (moby_dick,), (emma,) = load_text("moby_dick"), load_text("emma")
    assert moby_dick.text.startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert moby_dick.text.endswith("rolled on as it rolled five thousand years ago.")
    assert emma.text.startswith("EMMA\n\nBy Jane Austen")
    assert emma.text.endswith("FINIS")


def test_licence_file_lists_every_text_with_its_checksum() -> None:
    rows = re.findall(
        r"`(\w+)\.jsonl\.xz` \| (\d+) \| `(\w{64})`", FOLDER.joinpath("LICENSES.md").read_text()
    )
    assert {name for name, _, _ in rows} == set(list_texts())
    for name, num_bytes, digest in rows:
        plain = lzma.decompress(FOLDER.joinpath(f"{name}.jsonl.xz").read_bytes())
        assert (str(len(plain)), hashlib.sha256(plain).hexdigest()) == (num_bytes, digest)


def test_texts_stay_small() -> None:
    packed = [FOLDER.joinpath(f"{name}.jsonl.xz").read_bytes() for name in list_texts()]
    assert sum(map(len, packed)) <= 6_000_000


def test_a_file_among_the_names_is_told_its_place() -> None:
    with pytest.raises(ValueError, match="`files`"):
        load_text("my_book.txt")


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown text 'moby-dick'; did you mean 'moby_dick'\? Choose one of emma"
    ):
        load_text("moby-dick")
