"""What `memzoo evaluate` runs: signatures are the flags, docstrings the help."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .command_parts import (
    DType,
    check_output,
    load_for_use,
    model_place,
    progress_line,
    table,
    write_if_asked,
)


def evaluate_perplexity(
    model: str,
    text: str = "moby_dick",
    document: int = 0,
    tokenizer: str | None = None,
    window_size: int = 1024,
    num_windows: int | None = 8,
    first_token: int = 0,
    chunk_size: int = 1024,
    device: str = "auto",
    dtype: DType = "float32",
    output: str | None = None,
) -> str:
    """Perplexity of a model by position, over non-overlapping windows of one long document.

    Args:
        model: folder of a model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        text: name of a bundled text, or a .txt or .jsonl file.
        document: which document of the text, counted from 0.
        tokenizer: folder or .gguf file of the tokenizer; by default that of the model.
        window_size: predicted tokens per window; every window starts with an empty memory.
        num_windows: number of windows; null reads all that fit.
        first_token: token at which the first window starts.
        chunk_size: tokens read at once, which bounds the memory and changes no number.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
        output: .json file for the record.
    """
    check_output(output)
    import torch

    from ..models.reading import tokenizer_fingerprint
    from .data.documents import encode_documents, read_documents
    from .data.texts import list_texts, load_text
    from .data.tokenizers import load_tokenizer
    from .evaluate import position_losses

    source = model_place(model)
    is_file = Path(text).suffix in (".txt", ".jsonl")
    documents = read_documents(text) if is_file else [item.text for item in load_text(text)]
    if not documents:
        raise ValueError(f"{text!r} holds no document. Give a text with at least one.")
    if not 0 <= document < len(documents):
        raise ValueError(
            f"{text!r} has {len(documents)} documents, number {document} is not one of them. "
            f"Give 0 to {len(documents) - 1}; bundled texts are {', '.join(list_texts())}."
        )
    words = load_tokenizer(tokenizer or source)
    (ids,) = encode_documents(words, [documents[document]])
    loaded = load_for_use(source, device, dtype)
    tokens = torch.from_numpy(ids)
    settings = {
        "model": model,
        "text": text,
        "document": document,
        "tokenizer": tokenizer_fingerprint(words),
        "window_size": window_size,
        "num_windows": num_windows,
        "first_token": first_token,
        "chunk_size": chunk_size,
        "device": str(loaded.embed_tokens.weight.device),
        "dtype": dtype,
    }
    losses = position_losses(
        loaded,
        tokens,
        window_size=window_size,
        num_windows=num_windows,
        first_token=first_token,
        chunk_size=chunk_size,
        on_window=progress_line("windows"),
    )
    results = losses.to_dict()
    write_if_asked(output, "evaluate/perplexity", settings, results)
    rows = [("positions", "loss", "perplexity")]
    rows += [
        (f"{part['first']}..{part['last']}", f"{part['loss']:.4f}", f"{part['perplexity']:.2f}")
        for part in results["by_position"]
    ]
    rows.append(("all", f"{results['loss']:.4f}", f"{results['perplexity']:.2f}"))
    return table(rows)


def evaluate_mqar(
    model: str,
    vocab_size: int = 8192,
    input_seq_len: int = 64,
    num_kv_pairs: int = 4,
    num_examples: int = 1000,
    power_a: float = 0.01,
    random_non_queries: bool = False,
    num_updates: int = 0,
    seed: int = 2**31,
    batch_size: int = 100,
    device: str = "auto",
    dtype: DType = "float32",
    output: str | None = None,
) -> str:
    """Recall of a model on multi-query associative recall (MQAR).

    Args:
        model: folder of a model trained on MQAR.
        vocab_size: tokens of the task.
        input_seq_len: tokens per example.
        num_kv_pairs: key-value pairs per example.
        num_examples: examples.
        power_a: exponent of the gap law.
        random_non_queries: random tokens instead of 0 in the empty positions.
        num_updates: keys that get a second value.
        seed: seed of the examples; training draws its seeds below 2**31.
        batch_size: examples read at once.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
        output: .json file for the record.
    """
    check_output(output)
    from .data.mqar import MQARConfig
    from .evaluate import recall_on_mqar

    config = MQARConfig(
        vocab_size=vocab_size,
        input_seq_len=input_seq_len,
        num_kv_pairs=num_kv_pairs,
        num_examples=num_examples,
        power_a=power_a,
        random_non_queries=random_non_queries,
        num_updates=num_updates,
        seed=seed,
    )
    results = recall_on_mqar(load_for_use(model, device, dtype), config, batch_size=batch_size)
    settings = {"model": model, "task": vars(config), "batch_size": batch_size, "dtype": dtype}
    write_if_asked(output, "evaluate/mqar", settings, results)
    return f"accuracy {results['accuracy']:.4f} over {results['num_examples']} examples"


def evaluate_speed(
    model: str,
    lengths: Sequence[int] = (256, 1024, 4096),
    batch_size: int = 1,
    chunk_size: int = 1024,
    decode_tokens: int = 16,
    repetitions: int = 3,
    threads: int | None = None,
    device: str = "auto",
    dtype: DType = "float32",
    output: str | None = None,
) -> str:
    """Tokens per second of reading and of writing, bytes of state and peak memory, by length of the context.

    Args:
        model: folder of a model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        lengths: tokens in front of the written ones.
        batch_size: sequences at once.
        chunk_size: tokens read at once, which bounds the memory.
        decode_tokens: tokens written one by one in a timed run.
        repetitions: timed runs after one that is not timed, in turns over the lengths; medians count.
        threads: CPU threads; null leaves torch's choice.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
        output: .json file for the record.
    """
    check_output(output)
    import torch

    from .conversion.comparison import readable_bytes
    from .speed import check_sizes, measure_speed

    sizes = {
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "decode_tokens": decode_tokens,
        "repetitions": repetitions,
    }
    check_sizes(lengths, **sizes, **({} if threads is None else {"threads": threads}))
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load_for_use(model_place(model), device, dtype)
    rows = measure_speed(loaded, lengths, **sizes, on_step=progress_line("runs"))
    weights = list(loaded.parameters())
    results = {
        "lengths": rows,
        "num_parameters": loaded.num_parameters(),
        "weight_bytes": sum(weight.numel() * weight.element_size() for weight in weights),
    }
    settings = {"model": model, "lengths": [row["length"] for row in rows], **sizes}
    settings |= {"threads": torch.get_num_threads(), "device": str(weights[0].device), "dtype": dtype}
    write_if_asked(output, "evaluate/speed", settings, results)
    shown: list[tuple[str, ...]] = [("tokens", "read tokens/s", "written tokens/s", "state", "peak memory")]
    for row in rows:
        peak = "-" if row["peak_bytes"] is None else readable_bytes(row["peak_bytes"])
        rates = (f"{row[f'{kind}_tokens_per_second']:,.1f}" for kind in ("prefill", "decode"))
        shown.append((f"{row['length']:,}", *rates, readable_bytes(row["state_bytes"]), peak))
    return table(shown)


def compare(a: str, b: str, confidence: float = 0.95, output: str | None = None) -> str:
    """Paired difference of two perplexity records of the same windows.

    Args:
        a: record of one model (.json).
        b: record of the other; a negative difference means that a is better.
        confidence: coverage of the intervals.
        output: .json file for the record.
    """
    from ..records import read_record
    from .evaluate import compare_records

    difference = compare_records(read_record(a), read_record(b), confidence)
    write_if_asked(
        output, "evaluate/compare", {"a": a, "b": b, "confidence": confidence}, difference.to_dict()
    )
    return (
        f"a - b = {difference.mean:+.4f} nats per token over {difference.num_pairs} windows\n"
        f"{confidence:.0%} interval: t [{difference.t_low:+.4f}, {difference.t_high:+.4f}], "
        f"bootstrap [{difference.bootstrap_low:+.4f}, {difference.bootstrap_high:+.4f}]\n"
        "below 0, a is better; an interval that contains 0 shows nothing"
    )
