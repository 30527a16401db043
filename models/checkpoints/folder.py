"""Reading and writing whole checkpoints (Llama-style, Mamba, GGUF) in the names of `MemoryLM`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...layers.contract import MixerConfig
from ...layers.registry import build_mixer
from ..config import ModelConfig
from ..decoder import MemoryLM, float32_parameter_names, parameter_tags, restore_parameter_tags
from .config_reader import SourceWeight, check_names
from .errors import CheckpointError
from .families import (
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    deinterleave,
    gguf_weight_map,
    hf_weight_map,
)
from .files import (
    MANIFEST_NAME,
    TRAINING_KIND,
    StrPath,
    peek_folder,
    read_json,
    verify_folder,
    write_folder,
)
from .gguf_files import open_gguf
from .mamba import is_mamba, mamba_config, mamba_config_values, mamba_weight_map
from .safetensors_files import (
    INDEX_NAME,
    iterate_safetensors,
    list_weights,
    plan_shards,
    write_safetensors_in_place,
)

CONFIG_NAME = "config.json"
MODEL_TYPE = "memzoo"  # of our own folders
MODEL_KEY = "memory"  # where their config.json holds the ModelConfig

# buffers of old checkpoints that are no weights
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


def checked_place(path: StrPath) -> Path:
    """The path of a checkpoint, after a look at whether one can be there; nothing is read.

    Raises:
        CheckpointError: nothing is there, a training checkpoint, or a folder without a model; the message
            names the models that lie nearby.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{str(path)!r} does not exist (looked in {Path.cwd()}). {_nearest(path)}"
            "Give a model folder or a .gguf file; models of a hub are not downloaded, and shipped "
            "configurations have no weights."
        )
    if path.suffix == ".ckpt" or (peek_folder(path) or {}).get("kind") == TRAINING_KIND:
        model = path.parent.parent / "model"
        there = f"That of this run is {str(model)!r}." if (model / CONFIG_NAME).is_file() else ""
        raise CheckpointError(
            f"{path} is a checkpoint of training, which only `memzoo train` reads. "
            f"A model is a folder, written at the end of a run. {there}"
        )
    if path.is_dir() and not any((path / name).is_file() for name in (CONFIG_NAME, MANIFEST_NAME)):
        inner = [
            str(file.parent)
            for pattern in ("*", "*/*", "*/*/*")
            for file in sorted(path.glob(f"{pattern}/{CONFIG_NAME}"))
        ]
        there = f"Models lie in {', '.join(inner[:4])}." if inner else "Give the folder of a model."
        raise CheckpointError(f"the folder {str(path)!r} holds no {CONFIG_NAME}. {there}")
    return path


def _nearest(path: Path) -> str:
    """A question after the sibling with the nearest name, if there is one."""
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f"Did you mean {str(path.parent / close[0])!r}? " if close else ""


def read_model_config(path: StrPath) -> ModelConfig:
    """The config of a checkpoint: a folder saved by memzoo, a Llama-style or Mamba folder, or a GGUF file.

    Raises:
        CheckpointError: nothing readable there, another kind of model, or a value that is missing or
            impossible.
    """
    path = checked_place(path)
    if path.is_file():
        return config_from_gguf(open_gguf(path))
    verify_folder(path, only=[CONFIG_NAME])
    values = read_json(path / CONFIG_NAME)
    if values.get("model_type") == MODEL_TYPE:
        return config_from_own(values, str(path / CONFIG_NAME))
    if is_mamba(values):
        return mamba_config(values, str(path / CONFIG_NAME))
    return config_from_hf(values, str(path / CONFIG_NAME))


def config_from_own(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The ModelConfig inside the `config.json` of a folder saved by memzoo.

    Args:
        values: the parsed file.
        where: named in errors.

    Raises:
        CheckpointError: no valid model config, or a key that names code to import.
    """
    if "auto_map" in values:
        raise CheckpointError(
            f"{where} has auto_map, which names code to import. "
            "Beside weights only registered mixers may be named; delete the key."
        )
    memory = values.get(MODEL_KEY)
    if not isinstance(memory, Mapping):
        raise CheckpointError(f"{where} has no {MODEL_KEY!r} section. It was not saved by memzoo.")
    try:
        return ModelConfig.from_dict(memory)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} does not describe a possible model: {error}") from error


def read_token_ids(path: StrPath) -> dict[str, Any]:
    """The `bos_token_id`, `eos_token_id` and `pad_token_id` that a checkpoint states."""
    path = checked_place(path)
    if path.is_file():
        metadata = open_gguf(path).metadata
        names = {
            "bos_token_id": "bos_token_id",
            "eos_token_id": "eos_token_id",
            "pad_token_id": "padding_token_id",
        }
        found = {ours: metadata.get(f"tokenizer.ggml.{theirs}") for ours, theirs in names.items()}
    else:
        values = read_json(path / CONFIG_NAME)
        found = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in found.items() if value is not None}


def read_weights(
    path: StrPath, config: ModelConfig | None = None, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weights of a checkpoint under our names.

    Args:
        path: a Llama-style or Mamba folder, or a GGUF file (dequantised to float32).
        config: what `read_model_config` returned; read again if None.
        dtype: convert to this dtype, but for what stays float32 in half precision; default as stored.

    Returns:
        All weights, each of the shape that the config implies; with tied embeddings no `lm_head.weight`.

    Raises:
        CheckpointError: no or damaged weights, or names, shapes and dtypes that are not those of the config.
    """
    path = checked_place(path)
    config = config or read_model_config(path)
    if path.is_file():
        file = open_gguf(path)
        weight_map = gguf_weight_map(config, file.architecture)
        check_names(str(path), weight_map, {name: info.shape for name, info in file.tensors.items()})
        weights = {}
        for ours, source in weight_map.items():
            tensor = file.read(source.name, dtype or torch.float32)
            if source.interleaved_heads:
                tensor = deinterleave(tensor, source.interleaved_heads)
            weights[ours] = tensor
        return weights

    values = read_json(path / CONFIG_NAME)
    is_own = values.get("model_type") == MODEL_TYPE
    verify_folder(path, required=is_own)
    infos = {name: info for name, info in list_weights(path).items() if not _IGNORED.fullmatch(name)}
    if is_own:
        weight_map = own_weight_map(config)
    elif is_mamba(values):
        weight_map = mamba_weight_map(config, infos, where=str(path))
    else:
        weight_map = hf_weight_map(config)
    wrong = [] if is_own else [name for name, info in infos.items() if not info.dtype.is_floating_point]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]!r} has dtype {infos[wrong[0]].dtype}, expected floating-point weights."
        )
    shapes = {name: info.shape for name, info in infos.items()}
    spare_head = config.tie_embeddings and "lm_head.weight" in shapes
    if spare_head:
        shapes.pop("lm_head.weight")
    check_names(str(path), weight_map, shapes)
    loaded = dict(iterate_safetensors(infos))
    if spare_head and not torch.equal(
        loaded["lm_head.weight"], loaded[weight_map["embed_tokens.weight"].name]
    ):
        raise CheckpointError(
            f"{path} has a lm_head.weight that differs from the embedding, but its config ties them. "
            "Set tie_word_embeddings to false in config.json if the head is its own."
        )
    for source in weight_map.values():
        if source.has_middle_axis:
            loaded[source.name] = loaded[source.name].squeeze(1)
    if dtype is None:
        return {ours: loaded[source.name] for ours, source in weight_map.items()}
    kept: set[str] = set()
    if dtype in (torch.bfloat16, torch.float16):
        kept.update(float32_parameter_names(MemoryLM(config, device="meta")))
    return {
        ours: loaded[source.name].to(torch.float32 if ours in kept else dtype)
        for ours, source in weight_map.items()
    }


def own_weight_map(config: ModelConfig) -> dict[str, SourceWeight]:
    """Our names -> names in a folder saved by memzoo, whose model is wrapped once."""
    model = MemoryLM(config, device="meta")
    return {
        name: SourceWeight(f"model.{name}", tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }


def load_model(
    path: StrPath, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MemoryLM:
    """Builds the model of a checkpoint and loads its weights; every weight is accounted for.

    Args:
        path: a folder saved by memzoo, a Llama-style or Mamba folder, or a GGUF file.
        dtype: of the parameters; default as stored (GGUF: float32).
        device: where to put them.

    Raises:
        CheckpointError: nothing readable there, damaged files, or weights that are not those of the config.
    """
    config = read_model_config(path)
    weights = read_weights(path, config, dtype=dtype)
    return model_from_weights(config, weights, device=device)


def model_from_weights(
    config: ModelConfig, weights: Mapping[str, Tensor], *, device: torch.device | str = "cpu"
) -> MemoryLM:
    """A model whose parameters are the given tensors (not copied where they are on `device` already)."""
    model = MemoryLM(config, device="meta")
    tags = parameter_tags(model)
    model.load_state_dict({name: tensor.to(device) for name, tensor in weights.items()}, assign=True)
    restore_parameter_tags(model, tags)
    fill_tables(model)
    return model


def fill_tables(model: MemoryLM) -> None:
    """Computes the tables of mixers that are no weights, which a model built on the meta device lacks.

    One mixer of each kind is built for it, on the CPU, so that the model is never in memory twice.

    Args:
        model: a model whose weights are loaded; the tables get their device and dtype.
    """
    stored = model.state_dict().keys()
    missing = [name for name, _ in model.named_buffers() if name not in stored]
    weight = model.embed_tokens.weight
    known: list[tuple[MixerConfig, dict[str, Tensor]]] = []
    for index, (block, config) in enumerate(zip(model.blocks, model.config.mixers, strict=True)):
        prefix = f"layers.{index}.mixer."
        names = [name.removeprefix(prefix) for name in missing if name.startswith(prefix)]
        if not names:
            continue
        tables = next((found for other, found in known if other == config), None)
        if tables is None:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                tables = dict(build_mixer(config).named_buffers())
            known.append((config, tables))
        for name in names:
            dtype = weight.dtype if tables[name].is_floating_point() else tables[name].dtype
            place, _, leaf = name.rpartition(".")
            setattr(block.mixer.get_submodule(place), leaf, tables[name].to(weight.device, dtype, copy=True))


def export_llama_folder(
    model: MemoryLM, folder: StrPath, *, token_ids: Mapping[str, Any] | None = None
) -> None:
    """Writes the weights of a model of attention and windowed attention as an ordinary Llama-style folder.

    Args:
        model: what to save.
        folder: where to.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config.

    Raises:
        CheckpointError: no Llama-style family can express the model; the obstacle is named.
    """
    write_llama_folder(folder, model.config, model.state_dict(), token_ids=token_ids)


def write_llama_folder(
    folder: StrPath,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes an ordinary Llama-style Hugging Face folder that transformers loads without memzoo.

    Args:
        folder: where to; replaced as a whole, safe against a kill at any moment.
        config: a model of attention and windowed attention.
        weights: our names -> tensors, `lm_head.weight` left out or ignored where embeddings are tied.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config.
        max_shard_bytes: weights beyond it are split into several files.

    Raises:
        CheckpointError: no such family can express the model, or weights are missing or have other shapes.
    """
    values = {**config_to_hf(config), **(token_ids or {})}
    write_foreign_folder(
        folder,
        config,
        weights,
        hf_weight_map(config),
        values,
        kind="llama_style",
        max_shard_bytes=max_shard_bytes,
    )


def export_mamba_folder(
    model: MemoryLM,
    folder: StrPath,
    *,
    layout: str = "transformers",
    token_ids: Mapping[str, Any] | None = None,
) -> None:
    """Writes a pure stack of `mamba1` or of `mamba2` as a plain folder that is loaded without memzoo.

    Args:
        model: what to save.
        folder: where to; replaced as a whole, safe against a kill at any moment.
        layout: "transformers", or "state_spaces" for the names and the config of the original code.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` for the config of transformers.

    Raises:
        CheckpointError: the layout cannot express the model; the obstacle is named.
    """
    values = mamba_config_values(model.config, layout)
    if layout == "transformers":
        values.update(token_ids or {})
    weight_map = mamba_weight_map(model.config, layout=layout)
    write_foreign_folder(folder, model.config, model.state_dict(), weight_map, values, kind="mamba")


def write_foreign_folder(
    folder: StrPath,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    weight_map: Mapping[str, SourceWeight],
    values: dict[str, Any],
    *,
    kind: str,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the weights of a model under foreign names, beside a foreign config.

    Args:
        folder: where to; replaced as a whole, safe against a kill at any moment.
        config: of the model.
        weights: our names -> tensors, `lm_head.weight` left out or ignored where embeddings are tied.
        weight_map: our names -> what they are called there.
        values: the content of `config.json`, to which the dtype is added.
        kind: named in the manifest.
        max_shard_bytes: weights beyond it are split into several files.

    Raises:
        CheckpointError: weights are missing or have other shapes.
    """
    present = {
        name: tensor
        for name, tensor in weights.items()
        if not (name == "lm_head.weight" and config.tie_embeddings)
    }
    check_names(
        "the weights to save",
        {ours: SourceWeight(ours, _our_shape(source)) for ours, source in weight_map.items()},
        {name: tuple(tensor.shape) for name, tensor in present.items()},
    )
    tensors = {
        source.name: present[ours].unsqueeze(1) if source.has_middle_axis else present[ours]
        for ours, source in weight_map.items()
    }
    values["dtype"] = str(present["embed_tokens.weight"].dtype).removeprefix("torch.")
    write_weights_folder(folder, tensors, values, max_shard_bytes=max_shard_bytes, kind=kind)


def _our_shape(source: SourceWeight) -> tuple[int, ...]:
    return (source.shape[0], source.shape[2]) if source.has_middle_axis else source.shape


def write_weights_folder(
    folder: StrPath,
    tensors: Mapping[str, Tensor],
    config_values: Mapping[str, Any],
    *,
    kind: str,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes weights (sharded if large), `config.json` and, last, the manifest."""
    import json

    def shard_writer(names: list[str]) -> Any:
        return lambda path: write_safetensors_in_place(path, {name: tensors[name] for name in names})

    def json_writer(content: Mapping[str, Any]) -> Any:
        return lambda path: path.write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    shards = plan_shards(tensors, max_shard_bytes)
    writers = {file_name: shard_writer(names) for file_name, names in shards.items()}
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        writers[INDEX_NAME] = json_writer({"metadata": {"total_size": total}, "weight_map": weight_map})
    writers[CONFIG_NAME] = json_writer(config_values)
    write_folder(folder, writers, extra={"kind": kind})
