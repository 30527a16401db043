"""The functions behind the commands of `memzoo`: signatures are the flags, docstrings the help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from ..models.decoder import MemoryLM

DType = Literal["float32", "bfloat16"]


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
    _check_output(output)
    from .data.text import encode_documents, read_documents
    from .data.texts import list_texts, load_text
    from .data.tokenizers import load_tokenizer
    from .evaluate import position_losses

    source = _place(model)
    is_file = Path(text).suffix in (".txt", ".jsonl")
    documents = read_documents(text) if is_file else [item.text for item in load_text(text)]
    if not 0 <= document < len(documents):
        raise ValueError(
            f"{text!r} has {len(documents)} documents, number {document} is not one of them. "
            f"Give 0 to {len(documents) - 1}; bundled texts are {', '.join(list_texts())}."
        )
    words = load_tokenizer(tokenizer or source)
    (ids,) = encode_documents(words, [documents[document]])
    loaded = _load_model(source, device, dtype)
    tokens = _tensor(ids)
    settings = {
        "model": model,
        "text": text,
        "document": document,
        "tokenizer": _tokenizer_fingerprint(words),
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
        on_window=_progress("windows"),
    )
    results = losses.to_dict()
    _write(output, "evaluate/perplexity", settings, results)
    rows = [("positions", "loss", "perplexity")]
    rows += [
        (f"{part['first']}..{part['last']}", f"{part['loss']:.4f}", f"{part['perplexity']:.2f}")
        for part in results["by_position"]
    ]
    rows.append(("all", f"{results['loss']:.4f}", f"{results['perplexity']:.2f}"))
    return _table(rows)


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
    _check_output(output)
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
    results = recall_on_mqar(_load_model(model, device, dtype), config, batch_size=batch_size)
    settings = {"model": model, "task": vars(config), "batch_size": batch_size, "dtype": dtype}
    _write(output, "evaluate/mqar", settings, results)
    return f"accuracy {results['accuracy']:.4f} over {results['num_examples']} examples"


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
    _write(output, "evaluate/compare", {"a": a, "b": b, "confidence": confidence}, difference.to_dict())
    return (
        f"a - b = {difference.mean:+.4f} nats per token over {difference.num_pairs} windows\n"
        f"{confidence:.0%} interval: t [{difference.t_low:+.4f}, {difference.t_high:+.4f}], "
        f"bootstrap [{difference.bootstrap_low:+.4f}, {difference.bootstrap_high:+.4f}]"
    )


def convert(
    source: str,
    output: str,
    recipe: str = "lolcats",
    control: bool = True,
    books: Sequence[str] = ("moby_dick", "emma"),
    num_windows: int = 8,
    seed: int | None = None,
    align_steps: int | None = None,
    tune_steps: int | None = None,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> str:
    """Convert a pretrained model into a memory hybrid, tune it, and measure it beside its controls.

    Args:
        source: folder of a Llama-style model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        output: folder for the results: `hybrid/` (and `control/`) as Hugging Face folders, `report.json`.
        recipe: name of a shipped recipe (configs/convert) or a YAML file.
        control: also train the control, a window with the same sinks, budget, tokens and seed but no memory.
        books: bundled texts for the comparison; an empty list leaves it out.
        num_windows: windows of 1,024 tokens of each book.
        seed: replaces the seed of the recipe.
        align_steps: replaces the number of alignment steps of the recipe.
        tune_steps: replaces the number of tune steps of the recipe.
        accelerator: where to train, as Lightning names it.
        overwrite: replace the results of an earlier conversion in the output folder.
    """
    from ..models.checkpoints.folder import load_model, read_model_config
    from ..models.hf import save_model
    from ..records import refuse_content, results_folder, write_record
    from .comparison import comparison_results, comparison_table
    from .convert import (
        FIRST_TOKEN,
        WINDOW_SIZE,
        Conversion,
        book_tokens,
        check_accelerator,
        convert_and_compare,
        training_results,
    )
    from .data.tokenizers import load_tokenizer
    from .evaluate import window_starts
    from .recipe import check_recipe, read_recipe, recipe_dict

    chosen = read_recipe(recipe, seed=seed, align_steps=align_steps, tune_steps=tune_steps)
    check_accelerator(accelerator)
    place = _place(source)
    # all that can be wrong is found before the weights are read
    check_recipe(chosen, read_model_config(place))
    folder = Path(output)
    if not overwrite:
        refuse_content(folder, ("hybrid", "control", "report.json"))
    results_folder(folder)
    for name in ("hybrid", "control") if control else ("hybrid",):
        results_folder(folder / name)
    _check_output(str(folder / "report.json"))
    tokenizer = load_tokenizer(place)
    tokens = {book: book_tokens(tokenizer, book) for book in ([books] if isinstance(books, str) else books)}
    for ids in tokens.values():
        window_starts(len(ids), WINDOW_SIZE, num_windows, FIRST_TOKEN)

    def save(name: str, conversion: Conversion) -> None:
        if name == "hybrid":
            _drop_results(folder)
        save_model(conversion.model, folder / name, tokenizer)

    rows, hybrid, tuned_control = convert_and_compare(
        load_model(place).eval(),
        place,
        chosen,
        tokens=tokens,
        num_windows=num_windows,
        with_control=control,
        accelerator=accelerator,
        # saved as soon as it is trained, so that a later failure loses nothing
        on_trained=save,
    )
    results = comparison_results(rows) | training_results(hybrid, tuned_control)
    results["report"] = hybrid.report.to_dict()
    write_record(folder / "report.json", name="convert", config=recipe_dict(chosen), results=results)
    return f"{comparison_table(rows)}\n\nmodel written to {folder / 'hybrid'}"


def generate(
    model: str,
    prompt: str,
    tokenizer: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    chat: bool = False,
    device: str = "auto",
    dtype: DType = "float32",
) -> str:
    """Continue a prompt.

    Args:
        model: folder of a model, a .gguf file, or "smollm2-135m" (fetched once into the cache).
        prompt: text to continue.
        tokenizer: folder or .gguf file of the tokenizer; by default that of the model.
        max_new_tokens: longest continuation.
        temperature: 0 takes the most likely token; larger values sample more freely.
        top_k: sample among the k most likely tokens; 0 does not restrict.
        top_p: sample among the most likely tokens that hold this share of the probability.
        num_beams: width of the beam search; 1 is no search.
        seed: seed of the sampling.
        chat: put the prompt into the chat template of the tokenizer, as the user's turn.
        device: auto, cpu or cuda.
        dtype: precision of the weights.
    """
    import torch

    from ..models.hf import MemoryForCausalLM
    from .data.tokenizers import load_tokenizer

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(
            f"temperature must not be negative, got {temperature}. Use 0 for the most likely token."
        )
    source = _place(model)
    words = load_tokenizer(tokenizer or source)
    if chat:
        if not words.chat_template:
            raise ValueError("the tokenizer has no chat template. Leave --chat out.")
        prompt = words.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = torch.tensor([words.encode(prompt, add_special_tokens=not chat)], dtype=torch.int64)
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty. Give at least one character.")
    network = _load_model(source, device, dtype)
    wrapped = MemoryForCausalLM.from_model(network).eval()
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings |= {"eos_token_id": words.eos_token_id, "pad_token_id": _pad_token(words)}
    torch.manual_seed(seed)
    ids = ids.to(network.embed_tokens.weight.device)
    made = wrapped.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    text: str = words.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def inspect(model: str, num_tokens: int = 4096, dtype: DType = "float32") -> str:
    """Parameters, state bytes and FLOPs per token of every layer, at one context length. Reads no weights.

    Args:
        model: folder of a model, a .gguf file, "smollm2-135m", a YAML file that describes one, or the name of
            a shipped one.
        num_tokens: context length.
        dtype: of the activations; the keys and values of a window are stored in it.
    """
    import torch

    from ..models.checkpoints.fetch import locate
    from ..models.checkpoints.folder import read_model_config
    from .inspection import facts_table, inspect_model

    source = str(locate(model))
    is_checkpoint = Path(source).is_dir() or Path(source).suffix in (".gguf", ".ckpt")
    described = read_model_config(source) if is_checkpoint else _read_yaml_config(source)
    return facts_table(inspect_model(described, num_tokens, dtype=getattr(torch, dtype)))


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
        return _table(lists[what]())
    return "\n\n".join(f"{name}:\n{_indent(_table(rows()))}" for name, rows in lists.items())


def bench(
    mixer: str,
    d_model: int = 512,
    lengths: Sequence[int] = (1024, 2048, 4096),
    batch_size: int = 1,
    settings: dict[str, bool | int | float | str | None] | None = None,
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
    _check_output(output)
    from .benchmark import time_mixer

    rows, results = time_mixer(
        mixer,
        d_model=d_model,
        lengths=tuple(lengths),
        batch_size=batch_size,
        settings=dict(settings or {}),
        repetitions=repetitions,
        threads=threads,
        device=_device(device),
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
        "device": _device(device),
    }
    _write(output, "bench/mixer", config, results)
    return _table(rows)


def _place(name: str) -> str:
    """Where the model of this name is; raises ValueError when none is there."""
    from ..models.checkpoints.fetch import locate
    from ..models.checkpoints.folder import checked_place

    return str(checked_place(locate(name)))


def _drop_results(folder: Path) -> None:
    """Remove what an earlier conversion left and a new one may not replace."""
    import shutil

    from ..models.checkpoints.files import MANIFEST_NAME

    (folder / "report.json").unlink(missing_ok=True)
    if (folder / "control" / MANIFEST_NAME).is_file():
        shutil.rmtree(folder / "control")


def _load_model(source: str, device: str, dtype: DType) -> MemoryLM:
    import torch

    from ..models.checkpoints.folder import load_model

    return load_model(source, dtype=getattr(torch, dtype)).to(_device(device)).eval()


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no CUDA device. Use --device cpu.")
    if name != "cpu" and not name.startswith("cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}.")
    return name


def _tensor(ids: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(ids)


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Short digest of the vocabulary and its rules: two records are paired only when it is the same."""
    import hashlib

    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def _pad_token(tokenizer: Any) -> int | None:
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _check_output(output: str | None) -> None:
    """Raises ValueError when a record could not be written, before any work is done."""
    if output is not None:
        from ..records import results_folder

        if Path(output).is_dir():
            raise ValueError(f"output is the folder {output!r}. Name a .json file for the record.")
        results_folder(Path(output).parent)


def _write(output: str | None, name: str, config: dict[str, Any], results: dict[str, Any]) -> None:
    if output is not None:
        from ..records import write_record

        write_record(output, name=name, config=config, results=results)


def _progress(unit: str) -> Callable[[int, int], None] | None:
    """A progress line on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm  # type: ignore[import-untyped]

    line = tqdm(unit=unit, file=sys.stderr, leave=False)

    def advance(done: int, total: int) -> None:
        line.total = total
        line.update(done - line.n)
        if done == total:
            line.close()

    return advance


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


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    from .inspection import align_columns

    return align_columns(rows, num_left=2 if len(rows[0]) == 2 else 1) if rows else "(none)"


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
