"""Public-domain texts that come with the package: addresses for training, two novels for evaluation.

The names and what they hold::

    state_of_the_union           State of the Union addresses 1790 to 1988: 200 documents, by time
    state_of_the_union_heldout   the 33 later ones, to 2021
    moby_dick                    Herman Melville, Moby-Dick: one document
    emma                         Jane Austen, Emma: one document

Sources and licences are in LICENSES.md beside this file. Nothing is read before it is asked for.
"""

import difflib
import json
import lzma
from dataclasses import dataclass
from importlib import resources

_NAMES = ("emma", "moby_dick", "state_of_the_union", "state_of_the_union_heldout")


@dataclass(frozen=True)
class Document:
    """One text with its title."""

    title: str
    text: str


def list_texts() -> tuple[str, ...]:
    """Return the names that `load_text` knows, in alphabetical order."""
    return _NAMES


def load_text(name: str) -> tuple[Document, ...]:
    """Read one of the texts that come with the package.

    Args:
        name: one of `list_texts()`.

    Returns:
        Its documents in their own order: one per address, one for a whole novel.

    Raises:
        ValueError: there is no text of that name; the message names the nearest.
    """
    if name not in _NAMES:
        if str(name).endswith((".txt", ".jsonl")):
            raise ValueError(
                f"{str(name)!r} is no bundled text; those are {', '.join(_NAMES)}. A file of your own "
                "goes into `files` of the data."
            )
        nearest = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown text {name!r}; did you mean {nearest!r}? Choose one of {', '.join(_NAMES)}."
        )
    packed = resources.files(__package__).joinpath(f"{name}.jsonl.xz").read_bytes()
    # Not splitlines(): it would also cut at the exotic line ends that a text may hold.
    lines = lzma.decompress(packed).decode().removesuffix("\n").split("\n")
    return tuple(Document(**json.loads(line)) for line in lines)
