"""The Hugging Face configuration of a `MemoryLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from .checkpoints.folder import MODEL_TYPE, config_from_own
from .config import ModelConfig


class MemoryConfig(PretrainedConfig):
    """Hugging Face configuration around a `ModelConfig`.

    Args:
        memory: the `ModelConfig`, or the dictionary that describes it.
        kwargs: options of every Hugging Face config (`bos_token_id`, `eos_token_id`, ...).

    Raises:
        ValueError: no valid model config, or a key that names code to import.
    """

    model_type = MODEL_TYPE

    def __init__(self, memory: ModelConfig | Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if memory is not None and not isinstance(memory, ModelConfig):
            memory = config_from_own({**kwargs, "memory": memory}, "the config")
        self.memory: dict[str, Any] = {} if memory is None else memory.to_dict()
        if memory is not None:
            kwargs["tie_word_embeddings"] = memory.tie_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config from the content of a `config.json`.

        Raises:
            CheckpointError: it does not describe a memory model.
        """
        config_from_own(config_dict, str(kwargs.get("name_or_path", "the config")))
        return super().from_dict(config_dict, **kwargs)

    @property
    def model(self) -> ModelConfig:
        """The model config as an object."""
        return ModelConfig.from_dict(self.memory)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.memory["vocab_size"])

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.memory["d_model"])

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return int(self.memory["num_layers"])

    @property
    def max_position_embeddings(self) -> int | None:
        """Context length of pretraining, if known; nothing is cut at it."""
        return self.memory.get("max_position_embeddings")
