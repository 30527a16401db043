"""`MemoryLM` as a Hugging Face model: Auto classes, saved folders, `generate`, pipelines.

Importing this module registers the model type "memzoo" with `AutoConfig` and `AutoModelForCausalLM`. A saved
folder is an ordinary Hugging Face folder (`config.json`, `model.safetensors`, generation config, tokenizer if
you save one there) plus `memzoo_manifest.json`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as hf_logging

from .checkpoints.errors import CheckpointError
from .checkpoints.files import StrPath, verify_folder, write_folder
from .checkpoints.folder import CONFIG_NAME, MODEL_TYPE, fill_tables
from .checkpoints.safetensors_files import read_header
from .decoder import DecoderBlock, MemoryLM, float32_parameter_names, parameter_tags, restore_parameter_tags
from .hf_cache import MemoryCache
from .hf_config import MemoryConfig

__all__ = ["MemoryCache", "MemoryConfig", "MemoryForCausalLM", "save_model"]

# options of generate() that need what a memory cannot give: a state cannot be cut back to an earlier token
_REFUSED = {
    "assistant_model": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "use_mtp": "multi-token prediction",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "num_beam_groups": "diverse beam search",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "cache_implementation": "another cache than the memory's own",
    "custom_generate": "generation code from elsewhere",
}


class MemoryForCausalLM(PreTrainedModel, GenerationMixin):
    """A `MemoryLM` behind the interface of Hugging Face.

    Args:
        config: what to build.

    Attributes:
        model: the `MemoryLM`.
    """

    config_class = MemoryConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = [DecoderBlock.__name__]
    _is_stateful = True

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.model = MemoryLM(config.model)
        kept = float32_parameter_names(self.model)
        self._keep_in_fp32_modules_strict = [f"model.{name}" for name in kept]
        self.post_init()

    @classmethod
    def from_model(cls, model: MemoryLM, **token_ids: Any) -> MemoryForCausalLM:
        """Wraps a model; the weights are shared, not copied.

        Args:
            model: what to wrap.
            token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        """
        config = MemoryConfig(model.config, **token_ids)
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped.model = model
        wrapped.config.dtype = next(model.parameters()).dtype
        return wrapped

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Reads tokens and predicts the next ones.

        Args:
            input_ids: (B, T) tokens that are not yet in the cache.
            attention_mask: (B, T) or (B, tokens in the cache + T), nonzero = real token; any pattern.
            past_key_values: what an earlier call returned; changed in place, as Hugging Face caches are.
            labels: (B, T) targets, usually the inputs themselves; shifted here, -100 is ignored.
            use_cache: return a cache; default: when one was given.
            logits_to_keep: predict at the last so many positions only; 0 means all.
            output_hidden_states: also return the embeddings and the output of every block.
            output_attentions: refused when true.
            return_dict: False returns a tuple.
            inputs_embeds: refused unless None.

        Returns:
            `loss` if labels were given, `logits` (B, T, V), `past_key_values`, `hidden_states`.

        Raises:
            ValueError: inputs that do not fit each other, empty prompts, ids outside the vocabulary. Columns
                that are padding in every row are let through beside a cache; their logits are 0.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("memory models read token ids. Give input_ids and leave inputs_embeds out.")
        if output_attentions:
            raise ValueError(
                "output_attentions is not supported: most mixers have no attention weights. "
                "Use memzoo.layers.probe()."
            )
        if not isinstance(logits_to_keep, int):
            raise ValueError(
                "logits_to_keep must be a number of last positions, got a "
                f"{type(logits_to_keep).__name__}. Select positions from the logits instead."
            )
        if past_key_values is not None and not isinstance(past_key_values, MemoryCache):
            raise ValueError(
                f"past_key_values must be a MemoryCache, got {type(past_key_values).__name__}. "
                "Start with MemoryCache()."
            )
        use_cache = past_key_values is not None if use_cache is None else use_cache
        num_columns = input_ids.shape[1]
        mask = None if attention_mask is None else self._token_mask(attention_mask, input_ids)
        cache = past_key_values if past_key_values is not None else MemoryCache()
        hidden_states = None
        state = cache.state
        if past_key_values is not None and labels is None and mask is not None and not bool(mask.any()):
            return self._read_padding(input_ids, past_key_values, logits_to_keep, return_dict)
        is_step = num_columns == 1 and mask is None and use_cache and not output_hidden_states
        if is_step and state is not None:
            # the cache owns its state, so its memory may be reused; never under autograd
            out = self.model.step(input_ids[:, 0], state, donate=not torch.is_grad_enabled())
            logits = out.logits[:, None]
        else:
            last_only = logits_to_keep == 1 and labels is None
            out = self.model(
                input_ids,
                state,
                mask=mask,
                return_state=use_cache,
                return_hidden_states=bool(output_hidden_states),
                last_only=last_only,
            )
            logits = out.logits[:, None] if last_only else out.logits[:, -logits_to_keep:]
            hidden_states = out.hidden_states
        loss = None if labels is None else _next_token_loss(out.logits, labels)
        if use_cache:
            assert out.state is not None
            cache.update_state(out.state, num_columns)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states,
        )
        return result if return_dict or return_dict is None else result.to_tuple()

    def _read_padding(
        self, input_ids: Tensor, cache: MemoryCache, logits_to_keep: int, return_dict: bool | None
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The answer to columns that are padding in every row, which chunked prefill may meet."""
        rows, num_columns = input_ids.shape
        cache.update_state(cache.state, num_columns)
        weight = self.model.embed_tokens.weight
        logits = weight.new_zeros(rows, logits_to_keep or num_columns, weight.shape[0])
        result = CausalLMOutputWithPast(logits=logits, past_key_values=cache)
        return result if return_dict or return_dict is None else result.to_tuple()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Greedy decoding, sampling and beam search, with batches of unequal left-padded prompts.

        Args:
            inputs: (B, T) prompts; `input_ids` works too.
            generation_config: see transformers.
            kwargs: see transformers.

        Raises:
            ValueError: a mode that a memory cannot serve (it is named), an empty prompt, one that
                `past_key_values` has read to its end, or `prefill_chunk_size` with padding on the right.
        """

        def values_of(name: str) -> list[Any]:
            if name in kwargs:
                return [kwargs[name]]
            return [getattr(source, name, None) for source in (generation_config, self.generation_config)]

        for name, mode in _REFUSED.items():
            values = values_of(name)
            if any(value is not None and value is not False and value != 1 for value in values):
                raise ValueError(
                    f"{name} asks for {mode}, which memory models do not support. "
                    "Use greedy decoding, sampling or beam search."
                )
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        mask = kwargs.get("attention_mask")
        if isinstance(prompt, Tensor):
            is_empty = prompt.shape[-1] == 0 or (mask is not None and not bool(mask.bool().any(-1).all()))
            if is_empty:
                raise ValueError("a prompt is empty. Give at least one token, the bos token for instance.")
            if mask is not None and any(values_of("prefill_chunk_size")) and not bool(mask[..., -1].all()):
                raise ValueError(
                    "prefill_chunk_size needs prompts that are padded on the left, but a row of "
                    "attention_mask ends with padding. Pad on the left, or leave prefill_chunk_size out."
                )
            cache = kwargs.get("past_key_values")
            num_read = cache.get_seq_length() if isinstance(cache, MemoryCache) else 0
            # new tokens alone are told by a mask that covers the read ones too
            num_columns = prompt.shape[-1] if mask is None else mask.shape[-1]
            if num_read and num_read >= num_columns:
                raise ValueError(
                    f"past_key_values has read {num_read} tokens and the prompt has {prompt.shape[-1]}: none "
                    "is known to be new. Give the whole text with at least one more token, or the new tokens "
                    "alone with an attention_mask over all tokens."
                )
        return super().generate(inputs, generation_config=generation_config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved folder; content that differs from its manifest is refused.

        Args:
            pretrained_model_name_or_path: the folder.
            args, kwargs: see transformers.

        Raises:
            CheckpointError: damaged or incomplete files, or weights of another model.
        """
        folder = Path(str(pretrained_model_name_or_path))
        if folder.is_dir():
            manifest = verify_folder(folder, required=True)
            for name in manifest["files"] if manifest else ():
                if name.endswith(".safetensors"):
                    read_header(folder / name)
        # of weights of other shapes it then lists the names, as of missing ones, and does not keep them
        kwargs["ignore_mismatched_sizes"] = True
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(map(_in_words, info.get(problem) or ()))
            if names:
                raise CheckpointError(
                    f"{pretrained_model_name_or_path}: {problem.replace('_', ' ')}, first {names[0]} "
                    f"({len(names)} such). The weights are not those of the config."
                )
        twin = MemoryLM(model.config.model, device="meta")
        restore_parameter_tags(model.model, parameter_tags(twin))
        fill_tables(model.model)
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: StrPath, *args: Any, **kwargs: Any) -> None:
        """Writes an ordinary Hugging Face folder and its manifest, safe against a kill at any moment.

        Args:
            save_directory: created if absent.
            args, kwargs: see transformers.

        Raises:
            CheckpointError: `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file, expected the name of a folder to save into.")
        if not kwargs.get("is_main_process", True):
            return
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        try:
            super().save_pretrained(staging, *args, **kwargs)

            def mover(name: str) -> Callable[[Path], None]:
                return lambda path: os.replace(staging / name, path)

            names = sorted(path.name for path in staging.iterdir())
            sealed = [name for name in names if name == CONFIG_NAME or ".safetensors" in name]
            for name in set(names) - set(
                sealed
            ):  # may be edited later, so the manifest does not vouch for it
                os.replace(staging / name, folder / name)
            weights_first = sorted(sealed, key=lambda name: name == CONFIG_NAME)
            write_folder(folder, {name: mover(name) for name in weights_first}, extra={"kind": MODEL_TYPE})
        finally:
            for leftover in folder.glob(".saving-*"):  # this one, and those of saves that were killed
                shutil.rmtree(leftover, ignore_errors=True)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding.

        Raises:
            ValueError: the sizes differ.
        """
        weight = getattr(value, "weight", None)
        if weight is None or weight.shape != self.model.embed_tokens.weight.shape:
            raise ValueError(
                "the vocabulary of a memory model cannot be resized. Build a model with another vocab_size."
            )
        self.model.embed_tokens = cast(nn.Embedding, value)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """The embedding, unchanged.

        Raises:
            ValueError: another number of tokens than there are.
        """
        if new_num_tokens is not None and new_num_tokens != self.model.config.vocab_size:
            raise ValueError(
                f"the vocabulary of a memory model cannot be resized from {self.model.config.vocab_size} to "
                f"{new_num_tokens} tokens. Build a model with another vocab_size."
            )
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; None where it is the embedding."""
        return self.model.lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `MemoryLM` and its mixers initialise themselves when they are built."""

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, MemoryCache) and cache.state is not None and input_ids is not None:
            # one row per prompt becomes one per beam, unless the caller has done so already
            is_done = cache.state.batch_size != input_ids.shape[0]
            cache.batch_repeat_interleave(1 if is_done else expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MemoryCache()
        elif given is not None and not isinstance(given, MemoryCache):
            raise ValueError(
                f"past_key_values must be a MemoryCache, got {type(given).__name__}. "
                "Start with MemoryCache(state)."
            )

    @staticmethod
    def _token_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor | None:
        """The (B, T) boolean mask of this call, None where every token is real."""
        rows, length = input_ids.shape
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask must be (B, T) with B={rows} and at least T={length} columns, "
                f"got {tuple(attention_mask.shape)}."
            )
        mask = attention_mask[:, attention_mask.shape[1] - length :] != 0
        return None if bool(mask.all()) else mask


def save_model(model: MemoryLM, folder: StrPath, tokenizer: Any = None) -> None:
    """Writes a model, and its tokenizer if there is one, as an ordinary Hugging Face folder.

    Args:
        model: what to save.
        folder: created if absent.
        tokenizer: a transformers tokenizer; its special tokens become those of the model.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(tokenizer, name, None) for name in names}
    ids = {name: int(value) for name, value in found.items() if value is not None}
    with _without_progress():
        MemoryForCausalLM.from_model(model, **ids).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _without_progress() -> Iterator[None]:
    """Without the bar of transformers, which counts files and would break into our own progress line."""
    was_shown = hf_logging.is_progress_bar_enabled()
    if was_shown:
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            hf_logging.enable_progress_bar()


def _in_words(entry: Any) -> str:
    """A weight that transformers complains of: its name, and both shapes where they differ."""
    if isinstance(entry, str):
        return entry
    name, stored, expected = entry
    return f"{name} of shape {tuple(stored)} instead of {tuple(expected)}"


def _next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the next token, in float32."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device), ignore_index=-100
    )


AutoConfig.register(MODEL_TYPE, MemoryConfig)
AutoModelForCausalLM.register(MemoryConfig, MemoryForCausalLM)
