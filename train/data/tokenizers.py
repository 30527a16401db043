"""Tokenizers on this machine: the built-in bytes, a Hugging Face folder, or one inside a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = "bytes"
NUM_BYTES = 256
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from this machine.

    Args:
        source: ``"bytes"`` for the built-in byte vocabulary (257 tokens), a folder with a tokenizer, a
            ``.gguf`` file, or ``"smollm2-135m"`` (fetched once into the cache).

    Raises:
        ValueError: nothing usable lies there.
    """
    if source == BYTES:
        return byte_tokenizer()
    from ...models.checkpoints.fetch import locate

    path = locate(source)
    if path.is_file() and path.suffix == ".gguf":
        from ...models.checkpoints.tokenizers import tokenizer_from_gguf

        return tokenizer_from_gguf(path)
    if not path.is_dir():
        raise ValueError(
            f"no tokenizer at {source!r}. Give 'bytes', a folder that holds tokenizer.json, a .gguf file, or "
            "'smollm2-135m'."
        )
    if not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise ValueError(
            f"the folder {source!r} holds neither tokenizer.json nor tokenizer_config.json. "
            "Save the tokenizer there with tokenizer.save_pretrained(folder), or use 'bytes'."
        )
    from transformers import AutoTokenizer

    from ...models import hf  # noqa: F401  # registers our model type, of which transformers warns otherwise

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library underneath raises bare exceptions for damaged files
        raise ValueError(
            f"the tokenizer in {source!r} cannot be read ({' '.join(str(error).split()):.200}). "
            "Save it there again with tokenizer.save_pretrained(folder)."
        ) from error


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte vocabulary: token i < 256 is the byte i, token 256 ends a text. Any text round-trips."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(NUM_BYTES + number) for number, byte in enumerate(others)})
    return [symbols[byte] for byte in range(NUM_BYTES)]
