"""The Hugging Face wrapper: Auto classes, folders, generation, refusals."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

from memzoo.layers import registry
from memzoo.layers.attention import Attention, AttentionConfig
from memzoo.layers.registry import build_mixer
from memzoo.models.checkpoints import folder
from memzoo.models.checkpoints.errors import CheckpointError
from memzoo.models.checkpoints.files import MANIFEST_NAME
from memzoo.models.checkpoints.folder import load_model
from memzoo.models.config import ModelConfig
from memzoo.models.hf import MemoryCache, MemoryConfig, MemoryForCausalLM, save_model

from .damage import damaged_copies

VOCAB = 41
PAD, EOS = 0, 2


def small_config(**changes) -> ModelConfig:
    values = {
        "vocab_size": VOCAB,
        "d_model": 16,
        "layers": [{"type": "attention"}, {"type": "sliding_window", "window_size": 4, "num_sinks": 1}],
        "mixer_defaults": {"num_heads": 2},
        "mlp": {"type": "swiglu", "d_ff": 24},
        "initializer_range": 0.5,
    }
    return ModelConfig(**{**values, **changes})


def small_model(**changes) -> MemoryForCausalLM:
    torch.manual_seed(0)
    config = MemoryConfig(small_config(**changes), bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD)
    return MemoryForCausalLM(config).eval()


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def unequal_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.int64)
    for row, padding in enumerate((0, 3, 6)):
        mask[row, :padding] = 0
        ids[row, :padding] = PAD
    return ids, mask


@pytest.mark.parametrize("is_tied", [False, True])
def test_save_and_load_is_bit_equal(tmp_path, is_tied):
    model = small_model(tie_embeddings=is_tied)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "generation_config.json", MANIFEST_NAME} == set(
        os.listdir(tmp_path)
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MemoryForCausalLM
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), MemoryConfig)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        assert torch.equal(load_model(tmp_path)(ids).logits, expected)
    tags = {name: getattr(value, "_no_weight_decay", None) for name, value in model.named_parameters()}
    assert tags == {
        name: getattr(value, "_no_weight_decay", None) for name, value in loaded.named_parameters()
    }
    assert loaded.generation_config.eos_token_id == EOS
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16


def test_saving_again_replaces_and_shards(tmp_path):
    small_model().save_pretrained(tmp_path, max_shard_size="4KB")
    shards = [name for name in os.listdir(tmp_path) if name.startswith("model-")]
    assert len(shards) > 1
    ids = tokens(1, 5)
    expected = small_model()(ids).logits
    assert torch.equal(MemoryForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    assert torch.equal(load_model(tmp_path)(ids).logits, expected)
    small_model().save_pretrained(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("model-")]
    assert torch.equal(MemoryForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_saving_a_model_shows_no_bar_and_leaves_that_of_transformers_on(tmp_path, capfd):
    transformers.utils.logging.enable_progress_bar()
    save_model(small_model().model, tmp_path)
    assert capfd.readouterr().err == ""
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_wrapping_shares_the_weights(tmp_path):
    source = small_model().model
    wrapped = MemoryForCausalLM.from_model(source, eos_token_id=EOS, pad_token_id=PAD)
    assert wrapped.model is source
    wrapped.save_pretrained(tmp_path)
    ids = tokens(1, 6)
    assert torch.equal(load_model(tmp_path)(ids).logits, source(ids).logits)
    assert wrapped.generate(ids, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 9},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "sampling", "beam", "beam sampling", "chunked prefill"],
)
def test_cached_generation_equals_uncached(options):
    model = small_model()
    ids, mask = unequal_prompts()
    uncached = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    results = []
    for extra in (options, {**uncached, "use_cache": False}):
        torch.manual_seed(5)
        results.append(model.generate(ids, attention_mask=mask, max_new_tokens=30, **extra))
    assert torch.equal(*results)
    assert results[0].shape[1] > 12


def test_unequal_left_padded_prompts_equal_each_alone():
    model = small_model()
    ids, mask = unequal_prompts()
    for options in ({}, {"num_beams": 3}):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=20, **options)
        for row in range(3):
            prompt = ids[row, mask[row].bool()][None]
            alone = model.generate(prompt, max_new_tokens=20, **options)[0, prompt.shape[1] :]
            assert torch.equal(together[row, 7 : 7 + len(alone)], alone)
            assert (together[row, 7 + len(alone) :] == PAD).all()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 9])
def test_chunks_that_are_all_padding_equal_each_prompt_alone(chunk_size):
    model = small_model()
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.int64)
    for row, padding in enumerate((4, 5, 8)):
        mask[row, :padding], ids[row, :padding] = 0, PAD
    for options in ({}, {"num_beams": 3}):
        together = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, prefill_chunk_size=chunk_size, **options
        )
        for row in range(3):
            prompt = ids[row, mask[row].bool()][None]
            alone = model.generate(prompt, max_new_tokens=12, **options)[0, prompt.shape[1] :]
            assert torch.equal(together[row, 9 : 9 + len(alone)], alone)


def test_chunked_prefill_refuses_prompts_padded_on_the_right():
    model, ids = small_model(), tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with pytest.raises(ValueError, match="prefill_chunk_size needs prompts that are padded on the left"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, prefill_chunk_size=2)
    settings = transformers.GenerationConfig(max_new_tokens=4, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="prefill_chunk_size needs prompts that are padded on the left"):
        model.generate(ids, attention_mask=mask, generation_config=settings)
    with pytest.raises(ValueError, match="empty prompt"):
        model(ids, attention_mask=torch.zeros_like(mask), use_cache=True)


def test_beam_search_reorders_like_transformers(tmp_path):
    """The same weights in transformers' own Llama, with its own cache, give the same beams and scores."""
    from memzoo.models.checkpoints.folder import export_llama_folder

    model = small_model(layers=[{"type": "attention"}] * 2)
    export_llama_folder(
        model.model, tmp_path, token_ids={"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 1}
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, mask = unequal_prompts()
    options = {
        "attention_mask": mask,
        "num_beams": 4,
        "num_return_sequences": 3,
        "max_new_tokens": 24,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ours, theirs = model.generate(ids, **options), peer.generate(ids, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert (ours.sequences_scores - theirs.sequences_scores).abs().max() < 1e-5
    assert (ours.beam_indices[:, :8] != ours.beam_indices[:, :1]).any()  # beams did change places


def test_each_token_is_read_once():
    model = small_model()
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    model.generate(tokens(1, 7), max_new_tokens=10, min_new_tokens=10)
    assert seen == [7] + [1] * 9


def test_state_saved_then_continued_in_a_new_process(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model")
    ids, mask = unequal_prompts()
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=20, min_new_tokens=20)
    first = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True
    )
    assert torch.equal(first.sequences, whole[:, :15])
    # 14 columns are in the state: the last token is chosen but not yet read
    first.past_key_values.state.save(tmp_path / "state.safetensors")
    script = textwrap.dedent(
        """
        import json, sys
        import torch
        from memzoo.models.decoder import ModelState
        from memzoo.models.hf import MemoryCache, MemoryForCausalLM
        model = MemoryForCausalLM.from_pretrained(sys.argv[1])
        cache = MemoryCache(ModelState.load(sys.argv[2]))
        last = torch.tensor(json.loads(sys.argv[3]))
        mask = torch.ones(3, 15, dtype=torch.int64)
        lengths = {"max_new_tokens": 12, "min_new_tokens": 12}
        out = model.generate(last, attention_mask=mask, past_key_values=cache, **lengths)
        sys.stdout.write(json.dumps(out[:, 1:].tolist()))
        """
    )
    last = json.dumps(first.sequences[:, -1:].tolist())
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path / "state.safetensors"), last],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert json.loads(done.stdout) == whole[:, 15:].tolist()


def test_a_prefix_can_be_read_once_and_continued_often():
    model = small_model()
    prefix, question = tokens(1, 6), tokens(2, 3, seed=8)
    with torch.no_grad():
        state = model.model(prefix, return_state=True).state
    kept = state.clone()
    for row in range(2):
        whole = torch.cat([prefix, question[row : row + 1]], 1)
        expected = model.generate(whole, max_new_tokens=9)
        actual = model.generate(whole, past_key_values=MemoryCache(state), max_new_tokens=9)
        assert torch.equal(actual, expected)
    for (name, tensor), (_, before) in zip(state.named_tensors(), kept.named_tensors(), strict=True):
        assert torch.equal(tensor, before), name
    cache = MemoryCache(state)
    cache.batch_repeat_interleave(2)
    whole = torch.cat([prefix.expand(2, -1), question], 1)
    together = model.generate(whole, past_key_values=cache, max_new_tokens=9, min_new_tokens=9)
    assert torch.equal(together, model.generate(whole, max_new_tokens=9, min_new_tokens=9))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_loss_and_gradients_with_recomputation():
    model = small_model().train()
    ids, mask = unequal_prompts()
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert torch.equal(out.loss, expected)
    out.loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert model.model.gradient_checkpointing
    assert all(
        torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before, strict=True)
    )


def test_decoding_under_autograd_keeps_the_graph():
    model = small_model()
    ids = tokens(1, 5)
    cache = MemoryCache()
    model(ids, past_key_values=cache)
    out = model(ids[:, :1], past_key_values=cache)
    out.logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_outputs_in_every_form():
    model = small_model()
    ids = tokens(2, 6)
    full = model(ids, output_hidden_states=True)
    assert full.past_key_values is None
    assert len(full.hidden_states) == 3
    assert torch.equal(model(ids, return_dict=False)[0], full.logits)
    assert torch.equal(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    assert (model(ids, logits_to_keep=1).logits - full.logits[:, -1:]).abs().max() < 1e-5
    cache = model(ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 6
    cache.reset()
    assert cache.state is None


def test_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *(f"w{index}" for index in range(VOCAB - 3))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    small_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    out = generate(["w1 w2 w3", "w4"], max_new_tokens=4, do_sample=False, batch_size=2)
    assert [
        item[0]["generated_text"].startswith(text) for item, text in zip(out, ("w1", "w4"), strict=True)
    ] == [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": object()}, "assisted decoding"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "diverse beam"),
        ({"num_beams": 4, "force_words_ids": [[3]]}, "constrained beam"),
        ({"cache_implementation": "static"}, "another cache"),
        ({"custom_generate": "somebody/something"}, "code from elsewhere"),
        ({"past_key_values": transformers.DynamicCache()}, "MemoryCache"),
        ({"attention_mask": torch.tensor([[1, 1], [0, 0]])}, "prompt is empty"),
    ],
)
def test_modes_that_a_memory_cannot_serve_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_model().generate(tokens(2, 2), max_new_tokens=2, **options)


def test_other_misuse_is_named():
    model = small_model()
    with pytest.raises(ValueError, match="prompt is empty"):
        model.generate(tokens(1, 0), max_new_tokens=2)
    with pytest.raises(ValueError, match="cut back"):
        MemoryCache().crop(3)
    with pytest.raises(ValueError, match="serves no other model"):
        MemoryCache().update(None, None, 0)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens(1, 2), output_attentions=True)
    with pytest.raises(ValueError, match="leave inputs_embeds out"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens(2, 3), attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="cannot be resized"):
        model.set_input_embeddings(torch.nn.Embedding(VOCAB + 1, 16))
    with pytest.raises(ValueError, match="the vocabulary has the ids"):
        model.generate(torch.tensor([[VOCAB]]), max_new_tokens=1)


def test_a_prompt_that_the_cache_has_read_already_is_refused():
    model, ids = small_model(), tokens(1, 6)
    for length in (3, 6):
        cache = MemoryCache()
        model(ids, past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=f"read 6 tokens and the prompt has {length}"):
            model.generate(ids[:, :length], past_key_values=cache, max_new_tokens=2)
        mask = torch.ones_like(ids[:, :length])
        with pytest.raises(ValueError, match="none is known to be new"):
            model.generate(ids[:, :length], attention_mask=mask, past_key_values=cache, max_new_tokens=2)


def test_resizing_and_chosen_positions_are_refused_by_name():
    model, ids = small_model(), tokens(1, 6)
    before = model.model.embed_tokens
    with pytest.raises(ValueError, match=f"resized from {VOCAB} to 50"):
        model.resize_token_embeddings(50)
    assert model.resize_token_embeddings() is before
    with pytest.raises(ValueError, match="logits_to_keep must be a number"):
        model(ids, logits_to_keep=torch.tensor([1, 2]))


def test_a_config_that_names_code_is_refused_and_not_run(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for changed in (
        {**values, "auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}},
        {
            **values,
            "memory": {**values["memory"], "layers": [{"type": "evil.Evil"}] * 2, "mixer_defaults": {}},
        },
        {**values, "memory": {**values["memory"], "class_path": "evil.Evil"}},
    ):
        path.write_text(json.dumps(changed))
        for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
            with pytest.raises(ValueError, match=r"auto_map|is unknown|unknown key"):
                load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_our_own_folders_must_match_their_manifest(tmp_path):
    """500 damaged copies of weights and config are refused by both readers, whatever was hit."""
    model = small_model(layers=[{"type": "attention"}], d_model=4, mixer_defaults={"num_heads": 1})
    model.save_pretrained(tmp_path)
    for name, count in (("model.safetensors", 250), ("config.json", 250)):
        whole = (tmp_path / name).read_bytes()
        for index, broken in enumerate(damaged_copies(whole, count, seed=9)):
            if broken == whole:
                continue
            (tmp_path / name).write_bytes(broken)
            with pytest.raises(CheckpointError):
                load_model(tmp_path)
            if index < 5:
                with pytest.raises((ValueError, OSError), match=r"SHA-256|config"):
                    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
                with pytest.raises(CheckpointError, match="SHA-256"):
                    MemoryForCausalLM.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(whole)
    load_model(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=MANIFEST_NAME):
        load_model(tmp_path)


def test_contradictory_folders_are_refused_as_load_does(tmp_path):
    """A manifest that fits is no proof: the folder may have been sealed with what is wrong."""
    from memzoo.models.checkpoints.files import seal_folder

    small_model().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    values = json.loads(config.read_text())
    bare = {name: value for name, value in values.items() if name != "memory"}
    wider = {**values, "memory": {**values["memory"], "d_model": 32}}
    whole = weights.read_bytes()
    loaders = (transformers.AutoModelForCausalLM.from_pretrained, MemoryForCausalLM.from_pretrained)
    for content, described, auto_message, own_message in (
        (whole[:-100], values, "not a whole safetensors file", "not a whole safetensors file"),
        (whole, bare, "has no 'memory' section", "has no 'memory' section"),
        (whole, wider, r"of shape \(41, 16\) instead of \(41, 32\)", r"shape \(41, 16\)"),
    ):
        weights.write_bytes(content)
        config.write_text(json.dumps(described))
        seal_folder(tmp_path, ["config.json", "model.safetensors"])
        for load in loaders:
            with pytest.raises(CheckpointError, match=auto_message):
                load(tmp_path)
        with pytest.raises(CheckpointError, match=own_message):
            load_model(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path / "one")
    small_model(layers=[{"type": "attention"}]).save_pretrained(tmp_path / "two")
    (tmp_path / "one" / "model.safetensors").replace(tmp_path / "two" / "model.safetensors")
    from memzoo.models.checkpoints.files import seal_folder

    seal_folder(tmp_path / "two", ["config.json", "model.safetensors"])
    with pytest.raises(CheckpointError, match="unexpected keys"):
        MemoryForCausalLM.from_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match="belongs to no part"):
        load_model(tmp_path / "two")
    with pytest.raises(CheckpointError, match="is a file"):
        small_model().save_pretrained(tmp_path / "one" / "config.json")


class TableAttention(Attention):
    """Attention scaled by a table that is no weight, as a user's mixer may have one."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.full((config.d_model,), 0.5), persistent=False)

    def mix(self, x, ctx, state):
        return super().mix(x * self.table, ctx, state)


def test_tables_that_are_no_weights_are_computed_when_loading(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._MIXERS, "table", registry.MixerEntry(TableAttention, AttentionConfig))
    model = small_model(layers=[{"type": "table"}])
    model.save_pretrained(tmp_path)
    ids = tokens(1, 5)
    expected = model(ids).logits
    assert torch.equal(MemoryForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
    assert torch.equal(load_model(tmp_path)(ids).logits, expected)
    low = load_model(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in (*low.parameters(), *low.buffers())} == {torch.bfloat16}


def test_tables_cost_one_mixer_of_each_kind_and_no_random_number(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._MIXERS, "table", registry.MixerEntry(TableAttention, AttentionConfig))
    small_model(layers=[{"type": "table"}] * 4).save_pretrained(tmp_path)
    built = []
    monkeypatch.setattr(folder, "build_mixer", lambda config: built.append(config) or build_mixer(config))
    before = torch.get_rng_state()
    model = load_model(tmp_path)
    assert len(built) == 1
    assert torch.equal(torch.get_rng_state(), before)
    tables = [block.mixer.table for block in model.blocks]
    assert len({table.data_ptr() for table in tables}) == 4
    assert all(bool((table == 0.5).all()) for table in tables)
