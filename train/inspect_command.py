"""What `memzoo inspect`, `list` and `bench` run: signatures are the flags, docstrings the help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from .command_parts import DType, check_output, device_name, model_place, table, write_if_asked

Plain = bool | int | float | str | None  # no open type: what the parser builds from one may name a class

_MOST_DRAWN = 2048  # tokens of a map, which grows with their square


def inspect(
    model: str,
    num_tokens: int = 4096,
    dtype: DType = "float32",
    retention: str | None = None,
    stored: str | None = None,
    text: str = "emma",
    budget: int = 64,
    buffer: int = 1,
) -> str:
    """Parameters, state bytes and FLOPs per token of every layer, at one context length. Reads no weights.

    With `retention` it reads them, and draws what the retention gates of a model keep of a text; with
    `stored` what the layers with a store (bmojo) put there.

    Args:
        model: folder of a model, a .gguf file, "smollm2-135m", a YAML file that describes one, or the name of
            a shipped one.
        num_tokens: context length.
        dtype: of the activations; the keys and values of a window are stored in it.
        retention: .html file for the page about the gates.
        stored: .html file for the text with the stored tokens marked, a strip per layer.
        text: bundled text whose first `num_tokens` tokens (2,048 at most) are read.
        budget: tokens that each head with a gate keeps.
        buffer: tokens between two evictions.
    """
    if retention is not None:
        return _draw_retention(model, retention, text, min(num_tokens, _MOST_DRAWN), budget, buffer)
    if stored is not None:
        return _draw_stored(model, stored, text, min(num_tokens, _MOST_DRAWN))
    import torch

    from ..models.checkpoints.fetch import locate
    from ..models.checkpoints.folder import read_model_config
    from .inspection import facts_table, inspect_model

    source = str(locate(model))
    is_checkpoint = Path(source).is_dir() or Path(source).suffix in (".gguf", ".ckpt")
    described = read_model_config(source) if is_checkpoint else _read_yaml_config(source)
    return facts_table(inspect_model(described, num_tokens, dtype=getattr(torch, dtype)))


def _draw_retention(model: str, output: str, text: str, num_tokens: int, budget: int, buffer: int) -> str:
    """Writes the page and returns its main figures."""
    if Path(output).suffix != ".html":
        raise ValueError(f"the page of --retention must be an .html file, got {output!r}.")
    check_output(output)
    from ..models.checkpoints.folder import load_model
    from ..records import write_text_atomically
    from .conversion.run import book_tokens
    from .data.tokenizers import load_tokenizer
    from .report_page import render_page
    from .retention_map import punctuation_lift, retention_facts, retention_sections

    place = model_place(model)
    tokenizer = load_tokenizer(place)
    tokens = book_tokens(tokenizer, text)[None, :num_tokens]
    facts = retention_facts(load_model(place).eval(), tokens, budget, buffer=buffer)
    pieces = [tokenizer.decode([token]) for token in tokens[0].tolist()]
    title = f"What {Path(model).resolve().name} keeps of {text}"
    write_text_atomically(Path(output), render_page(title, retention_sections(facts, pieces)))
    rows = [("layer", "soft cache size / budget", "half-life (median)")]
    lives = facts.half_lives.unflatten(1, (len(facts.layers), -1))
    for place_of, layer in enumerate(facts.layers):
        median = float(lives[:, place_of].median())
        rows.append((str(layer), f"{float(facts.layer_sizes[place_of]):.2f}", f"{median:,.0f}"))
    lift = punctuation_lift(facts, pieces)
    held = f"punctuation is held {lift:.2f} times as often as any token"
    return f"{table(rows)}\n\n{held}\npage written to {output}"


def _draw_stored(model: str, output: str, text: str, num_tokens: int) -> str:
    """Writes the page and returns what each layer stored."""
    if Path(output).suffix != ".html":
        raise ValueError(f"the page of --stored must be an .html file, got {output!r}.")
    check_output(output)
    from ..models.checkpoints.folder import load_model
    from ..records import write_text_atomically
    from .conversion.run import book_tokens
    from .data.tokenizers import load_tokenizer
    from .stored_tokens import stored_tokens, strip_page, summary_rows

    place = model_place(model)
    tokenizer = load_tokenizer(place)
    tokens = book_tokens(tokenizer, text)[:num_tokens]
    layers = stored_tokens(load_model(place), tokens)
    words = [tokenizer.decode([token]) for token in tokens.tolist()]
    title = f"What {Path(model).resolve().name} stores of {text}"
    write_text_atomically(Path(output), strip_page(title, words, layers))
    return f"{table(summary_rows(layers, words))}\npage written to {output}"


def list_all(what: Literal["all", "mixers", "texts", "configs", "kernels"] = "all") -> str:
    """What is there: mixers, bundled texts, shipped configurations, backends of the kernels.

    Args:
        what: one of the lists, or all.
    """
    lists: dict[str, Callable[[], list[tuple[str, str]]]] = {
        "mixers": _list_mixers,
        "texts": _list_texts,
        "configs": _list_configs,
        "kernels": _list_kernels,
    }
    if what != "all":
        return table(lists[what]())
    return "\n\n".join(f"{name}:\n{_indent(table(rows()))}" for name, rows in lists.items())


def bench(
    mixer: str,
    d_model: int = 512,
    lengths: Sequence[int] = (1024, 2048, 4096),
    batch_size: int = 1,
    settings: dict[str, Plain | list[Plain | dict[str, Plain]]] | None = None,
    repetitions: int = 3,
    threads: int | None = None,
    device: str = "auto",
    dtype: DType = "float32",
    output: str | None = None,
) -> str:
    """Time one mixer beside full attention of the same width.

    Timed are a forward pass, forward with backward, and one decoded token.

    Args:
        mixer: registered type; `memzoo list --what mixers` shows them.
        d_model: width of the tokens.
        lengths: sequence lengths.
        batch_size: sequences.
        settings: fields of the mixer, for example {num_heads: 8, window_size: 256}.
        repetitions: timed runs after one warm-up; the median is reported.
        threads: CPU threads; null leaves torch's choice.
        device: auto, cpu or cuda.
        dtype: precision.
        output: .json file for the record.
    """
    check_output(output)
    from .benchmark import time_mixer

    rows, results = time_mixer(
        mixer,
        d_model=d_model,
        lengths=tuple(lengths),
        batch_size=batch_size,
        settings=dict(settings or {}),
        repetitions=repetitions,
        threads=threads,
        device=device_name(device),
        dtype=dtype,
    )
    config = {
        "mixer": mixer,
        "settings": settings,
        "d_model": d_model,
        "lengths": list(lengths),
        "batch_size": batch_size,
        "repetitions": repetitions,
        "dtype": dtype,
        "device": device_name(device),
    }
    write_if_asked(output, "bench/mixer", config, results)
    return table(rows)


def _read_yaml_config(source: str) -> Any:
    """A ModelConfig from a YAML file: one of ours by name, a model alone, or the model of a training run."""
    import yaml

    from .. import configs
    from ..models.config import ModelConfig

    path = Path(source)
    if not path.is_file():
        path = configs.find(source, "models")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{source} must hold a mapping, got {type(content).__name__}.")
    inner = content.get("model", content)
    return ModelConfig.from_dict(inner.get("config", inner) if isinstance(inner, dict) else inner)


def _list_mixers() -> list[tuple[str, str]]:
    from ..layers.registry import list_mixers, mixer_entry

    return [(name, (mixer_entry(name).mixer.__doc__ or "").strip().split("\n")[0]) for name in list_mixers()]


def _list_texts() -> list[tuple[str, str]]:
    from .data.texts import list_texts, load_text

    rows = []
    for name in list_texts():
        documents = load_text(name)
        size = sum(len(document.text) for document in documents)
        rows.append(
            (name, f"{len(documents)} document{'s' if len(documents) > 1 else ''}, {size:,} characters")
        )
    return rows


def _list_configs() -> list[tuple[str, str]]:
    from .. import configs

    return [(name, configs.summary(name)) for name in configs.names()]


def _list_kernels() -> list[tuple[str, str]]:
    from ..kernels.backend import OPERATIONS, available_backends

    return [(name, ", ".join(available_backends(name))) for name in OPERATIONS]


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
