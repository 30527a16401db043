"""What `memzoo generate` runs: the signature is the flags, the docstring the help."""

from __future__ import annotations

from typing import Any

from .command_parts import DType, load_for_use, model_place, pad_token_id


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
    source = model_place(model)
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
    network = load_for_use(source, device, dtype)
    wrapped = MemoryForCausalLM.from_model(network).eval()
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings |= {"eos_token_id": words.eos_token_id, "pad_token_id": pad_token_id(words)}
    torch.manual_seed(seed)
    ids = ids.to(network.embed_tokens.weight.device)
    made = wrapped.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    text: str = words.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return text
