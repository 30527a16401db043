"""What `memzoo generate` runs: the signature is the flags, the docstring the help."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_parts import DType, load_for_use, model_place, pad_token_id, progress_line

if TYPE_CHECKING:
    from ..models.decoder import MemoryLM
    from ..models.reading import Reading

# lines of the state file beside those that name the model
_CHAT = "chat"


def generate(
    model: str,
    prompt: str | None = None,
    prompt_file: str | None = None,
    state: str | None = None,
    tokenizer: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    chat: bool = False,
    chunk_size: int = 1024,
    device: str = "auto",
    dtype: DType = "float32",
) -> str:
    """Continue a prompt, a conversation, or a book that was read before.

    Args:
        model: folder of a model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        prompt: text to continue; may be left out beside prompt_file, or to go on from a state.
        prompt_file: .txt file that is read in front of the prompt.
        state: file that keeps what was read and written. If it exists, reading goes on after it; afterwards
            the new state stands there. It belongs to this model, dtype and tokenizer.
        tokenizer: folder or .gguf file of the tokenizer; by default that of the model.
        max_new_tokens: longest continuation; 0 reads and writes nothing but the state.
        temperature: 0 takes the most likely token; larger values sample more freely.
        top_k: sample among the k most likely tokens; 0 does not restrict.
        top_p: sample among the most likely tokens that hold this share of the probability.
        num_beams: width of the beam search; 1 is no search.
        seed: seed of the sampling of this call.
        chat: put the prompt into the chat template of the tokenizer, as the user's turn; with a state, as
            the next turn of the conversation in it.
        chunk_size: tokens read at once, which bounds the memory and changes no number.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
    """
    _check_flags(prompt, prompt_file, state, max_new_tokens, temperature, num_beams, chunk_size, chat)
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k must be at least 0 and top_p above 0 and at most 1, got {top_k} and {top_p}. "
            "0 and 1 restrict nothing."
        )
    import torch

    from ..models.checkpoints.folder import read_model_config
    from ..models.reading import (
        Reading,
        check_reading,
        config_fingerprint,
        load_reading,
        read_tokens,
        save_reading,
        tokenizer_fingerprint,
    )
    from .data.tokenizers import load_tokenizer

    source = model_place(model)
    words = load_tokenizer(tokenizer or source)
    text = _prompt_text(prompt, prompt_file)
    notes: dict[str, str] | None = None
    if state is not None and Path(state).is_file():
        expected = config_fingerprint(read_model_config(source)) | {"dtype": dtype}
        notes = check_reading(state, expected | {"tokenizer": tokenizer_fingerprint(words)})
    ids, is_turn_after_reply = _prompt_ids(words, text, chat, notes)

    network = load_for_use(source, device, dtype)
    reading: Reading | None = None
    if state is not None and notes is not None:
        reading = load_reading(state, network, words)
        has_ended = int(reading.last[0]) == words.eos_token_id
        if has_ended and not ids:
            raise ValueError(
                f"the text in {state!r} has come to its end ({words.eos_token}). Give a --prompt to go on."
            )
        if has_ended and is_turn_after_reply:
            # the turn itself begins with the end of the reply, as the template writes it
            reading, ids = Reading.of(reading.state, torch.tensor(ids[:1])), ids[1:]
    reading = read_tokens(
        network,
        torch.tensor(ids, dtype=torch.int64),
        reading,
        chunk_size=chunk_size,
        on_chunk=progress_line("tokens"),
    )
    made: list[int] = []
    if max_new_tokens:
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        settings["do_sample"] = temperature > 0
        if temperature > 0:
            settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings |= {"eos_token_id": words.eos_token_id, "pad_token_id": pad_token_id(words)}
        torch.manual_seed(seed)
        made, reading = _continue(network, reading, settings, chunk_size)
    if state is not None:
        is_chat = chat or (notes or {}).get(_CHAT) == "begun"
        try:
            save_reading(reading, state, network, words, {_CHAT: "begun"} if is_chat else None)
        except OSError as error:
            raise ValueError(
                f"the state cannot be written to {state!r} ({error.strerror or error}); an earlier one there "
                f"is as it was. The text is: {words.decode(made, skip_special_tokens=True)!r}"
            ) from error
    if not max_new_tokens:
        num_read = int(reading.num_tokens[0]) + 1
        return f"{num_read:,} tokens read; {reading.state.num_bytes():,} bytes of state written to {state}"
    written: str = words.decode(made, skip_special_tokens=True)
    return written


def _check_flags(
    prompt: str | None,
    prompt_file: str | None,
    state: str | None,
    max_new_tokens: int,
    temperature: float,
    num_beams: int,
    chunk_size: int,
    chat: bool,
) -> None:
    """Raises ValueError for flags that contradict one another, before anything is loaded."""
    from ..records import results_folder

    if max_new_tokens < 0 or (max_new_tokens == 0 and state is None):
        raise ValueError(
            f"max_new_tokens must be at least 1, got {max_new_tokens}. 0 only reads and needs --state FILE."
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"temperature must be finite and not negative, got {temperature}. "
            "Use 0 for the most likely token."
        )
    for name, size in (("num_beams", num_beams), ("chunk_size", chunk_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}.")
    if prompt is None and prompt_file is None:
        if state is None or chat or not Path(state).is_file():
            raise ValueError("there is nothing to read. Give --prompt, --prompt_file, or both.")
        if max_new_tokens == 0:
            raise ValueError("there is nothing to do. Give a --prompt or a --prompt_file to read.")
    if state is not None:
        if Path(state).is_dir():
            raise ValueError(f"state is the folder {state!r}. Name a file for it.")
        results_folder(Path(state).parent)


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The file, then the prompt."""
    from .data.documents import check_characters

    check_characters(prompt or "", "--prompt")
    if prompt_file is None:
        return prompt or ""
    path = Path(prompt_file)
    if not path.is_file():
        raise ValueError(f"there is no file {prompt_file!r} (looked in {Path.cwd()}). Check --prompt_file.")
    try:
        return path.read_text(encoding="utf-8-sig") + (prompt or "")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{prompt_file} is not UTF-8 text ({error}). Save it as UTF-8 plain text."
        ) from error


def _prompt_ids(words: Any, text: str, chat: bool, notes: dict[str, str] | None) -> tuple[list[int], bool]:
    """The tokens to read, and whether they follow a reply as its chat template says."""
    from .chat_turns import first_turn, next_turn

    follows_reply = chat and notes is not None and notes.get(_CHAT) == "begun"
    if chat and not text:
        raise ValueError("the prompt is empty. Give at least one character.")
    if chat:
        text = next_turn(words, text) if follows_reply else first_turn(words, text)
    # a template writes its own special tokens, and a text that goes on has had its first one
    ids: list[int] = words.encode(text, add_special_tokens=not chat and notes is None)
    if not ids and notes is None:
        raise ValueError("the prompt is empty. Give at least one character.")
    return ids, follows_reply


def _continue(
    network: MemoryLM, reading: Reading, settings: dict[str, Any], chunk_size: int
) -> tuple[list[int], Reading]:
    """The tokens that the model writes, and where the reading stands after them."""
    import torch

    from ..models.hf import MemoryCache, MemoryForCausalLM
    from ..models.reading import Reading, read_tokens

    cache, num_tokens = MemoryCache(reading.state), settings["max_new_tokens"]
    advance = progress_line("tokens")

    def count(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Ends nothing; it is asked after every token."""
        if advance is not None:
            advance(ids.shape[1] - 1, num_tokens)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    out = (
        MemoryForCausalLM.from_model(network)
        .eval()
        .generate(
            reading.last.to(network.embed_tokens.weight.device),
            attention_mask=torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64),
            past_key_values=cache,
            return_dict_in_generate=True,
            stopping_criteria=[] if advance is None else [count],
            **settings,
        )
    )
    if advance is not None:
        advance(num_tokens, num_tokens)  # a text may end early
    made = out.sequences[0, 1:]
    if settings["num_beams"] > 1:
        # the rows of the cache are those of all beams: the one that won is read again
        return made.tolist(), read_tokens(network, made, reading, chunk_size=chunk_size)
    return made.tolist(), Reading.of(out.past_key_values.state, made[-1:])
