"""Toy GGUF language models, written the way llama.cpp's converter writes them."""

from pathlib import Path

import gguf
import torch
import transformers
from tokenizers import pre_tokenizers

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
WORDS = ["ab", "abc", "\u0120ab", "12", "\u0120\u0120"]
MERGES = ["a b", "ab c", "\u0120 ab", "1 2", "\u0120 \u0120"]


def vocabulary() -> tuple[list[str], list[int]]:
    """Three special tokens, the 256 bytes, and some words; with their types."""
    tokens = ["<|end|>", "<|start|>", "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS]
    return tokens, [3, 3, 4] + [1] * (len(tokens) - 3)


def toy_model(family: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A random model of transformers with the vocabulary above."""
    prefix = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    values = {
        "vocab_size": len(vocabulary()[0]),
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-5,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**values, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def write_gguf(path: Path, model: transformers.PreTrainedModel, **extra) -> None:
    """Writes weights, metadata and tokenizer; `extra` are further integers, floats or strings of metadata."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens, types = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in extra.items():
        name = key.replace("__", ".")
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    for name, tensor in model.state_dict().items():
        if name in OUTER:
            if not (name == "lm_head.weight" and config.tie_word_embeddings):
                writer.add_tensor(OUTER[name], tensor.numpy())
            continue
        _, _, index, part = name.split(".", 3)
        part, kind = part.rsplit(".", 1)
        if family == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
            halves = tensor.unflatten(0, (heads, 2, config.head_dim // 2))
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        writer.add_tensor(f"blk.{index}.{NAMES[part]}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
