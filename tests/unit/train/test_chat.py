"""Conversations: the assistant's tokens, packing, and what can be wrong with them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.train.data.chat import ChatBatches, ChatDataModule
from memzoo.train.data.conversations import Conversation, ConversationEncoder, messages_of
from memzoo.train.data.datasets_source import DatasetSource

# Every template beside a second form in which transformers itself marks the assistant's part.
TEMPLATES = {
    "default system prompt": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "MARK{{ message['content'] + '<|im_end|>' }}END{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "header": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '[' + message['role'] + ']\n\n' }}"
        "MARK{{ message['content'] | trim + '<|im_end|>' }}END{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
    ),
    "no generation prompt": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "MARK{{ ' ' + message['content'] + eos_token }}END{% else %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "end in plain text": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ 'Answer:' }}MARK{{ ' ' + message['content'] + '\n' }}END{% else %}"
        "{{ 'Question: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    ),
}
TALK = [
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "  In the house, 12 m from here."},
    {"role": "user", "content": "Zoë ☃ 🙂 asks again"},
    {"role": "assistant", "content": "🙂 still there ☃"},
    {"role": "user", "content": "thanks"},
]


def plain(template: str) -> str:
    return template.replace("MARK", "").replace("END", "")


def marked(template: str) -> str:
    """With generation tags; the content of other roles is written outside of them."""
    before, _, rest = template.partition("MARK")
    inside, _, after = rest.partition("END")
    if "{% else %}" in after:
        return f"{before}{{% generation %}}{inside}{{% endgeneration %}}{after}"
    either = (
        f"{{% if message['role'] == 'assistant' %}}{{% generation %}}{inside}{{% endgeneration %}}"
        f"{{% else %}}{inside}{{% endif %}}"
    )
    return f"{before}{either}{after}"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level tokenizer whose offsets leave out white space, as GPT-2's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [message["content"] for message in TALK] + ["system user assistant Answer: Question:\n\n"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts * 3, trainer)
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def replies(encoder: ConversationEncoder, conversation: Conversation) -> list[str]:
    """What the marked stretches of tokens say."""
    tokens, is_reply = conversation.tokens, conversation.is_reply
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_reply.astype(int), [0]])))
    return [encoder.tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("source", ["bpe", "bytes"])
def test_the_assistants_tokens_are_those_that_transformers_marks(name: str, source: str, bpe: Path) -> None:
    folder = "bytes" if source == "bytes" else str(bpe)
    encoder = ConversationEncoder(folder, plain(TEMPLATES[name]))
    (conversation,) = encoder.encode([("here", TALK)])
    (text,), (spans,) = render_jinja_template(
        [TALK],
        chat_template=marked(TEMPLATES[name]),
        return_assistant_tokens_mask=True,
        **encoder.tokenizer.special_tokens_map,
    )
    assert encoder.tokenizer.decode(conversation.tokens) == text
    expected = [text[first:last] for first, last in spans]
    if source == "bytes" and name == "default system prompt":
        # here no special token ends the turn, so what follows it belongs to it
        expected = [reply + "\n" for reply in expected]
    assert replies(encoder, conversation) == expected
    assert all(TALK[2 * n + 1]["content"].strip() in reply for n, reply in enumerate(expected))
    assert len(expected) == 2


def test_the_tokenizer_of_the_tests_leaves_white_space_out_of_offsets(bpe: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bpe)
    encoded = tokenizer("a still", return_offsets_mapping=True)
    assert all(first != 1 for first, _ in encoded["offset_mapping"])
    assert tokenizer.decode(encoded["input_ids"]) == "a still"


BAD_TEMPLATES = {
    "forgets": (
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
        "{{ m.role + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}",
        r"line 3: the chat template of 'bytes' writes the messages up to number 2 differently",
    ),
    "thinks": (
        "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}assistant<think>{% endif %}",
        "up to number 2 differently",
    ),
    "strict": (
        "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}{{ messages[0].content }}",
        "refuses the first 5 messages: too long",
    ),
    "broken": ("{% for m in messages %}", "refuses the first 5 messages"),
    "of another kind": (
        "{{ messages[0].content + 1 }}",
        "refuses the first 5 messages: can only concatenate",
    ),
}


@pytest.mark.parametrize("name", BAD_TEMPLATES)
def test_templates_that_cannot_be_used_are_refused(name: str) -> None:
    template, message = BAD_TEMPLATES[name]
    with pytest.raises(ValueError, match=message):
        ConversationEncoder("bytes", template).encode([("line 3", TALK)])


def test_a_template_is_needed(tmp_path: Path, bpe: Path) -> None:
    with pytest.raises(ValueError, match="'bytes' has no chat template"):
        ConversationEncoder("bytes")
    with pytest.raises(ValueError, match="there is no template"):
        ConversationEncoder("bytes", "missing.jinja")
    path = tmp_path / "own.jinja"
    path.write_text(plain(TEMPLATES["header"]))
    assert len(ConversationEncoder(str(bpe), str(path)).encode([("here", TALK)])) == 1


def test_the_assistant_cannot_speak_first() -> None:
    encoder = ConversationEncoder("bytes", plain(TEMPLATES["header"]))
    with pytest.raises(ValueError, match="line 7: the assistant speaks first"):
        encoder.encode([("line 7", TALK[1:])])


def test_both_forms_of_messages_are_read() -> None:
    ours = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert messages_of({"messages": ours}, "messages", "here") == ours
    assert messages_of({"conversations": shared}, "conversations", "here") == ours


@pytest.mark.parametrize(
    "record, message",
    [
        ({"talk": []}, r"line 1 has no field 'messages' \(it has: talk\)"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "line 1, message 1 must have the texts"),
        ({"messages": [TALK[0], {"text": "x"}]}, "line 1, message 2 must have the texts"),
    ],
)
def test_what_is_no_conversation_is_refused(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        messages_of(record, "messages", "line 1")


# ---------------------------------------------------------------- batches


def talk(number: int, length: int, start: int = 3) -> Conversation:
    """Tokens that count up; the assistant speaks from ``start`` on."""
    return Conversation(100 * number + np.arange(length), np.arange(length) >= start)


def test_whole_conversations_are_packed_and_labelled() -> None:
    lengths = (6, 5, 9, 4, 30, 7)
    batches = ChatBatches([talk(n, length) for n, length in enumerate(lengths)], seq_len=10, batch_size=2)
    assert batches.rows == [[0, 1], [2], [3], [4], [5]]
    batch = batches.batch(0, 0)
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 17]
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 100, 101, 102, 103, *range(200, 208)]]
    none = [-100, -100]
    assert batch.labels.tolist() == [[*none, 3, 4, 5, *none, 103, 104, *none, *range(203, 209)]]
    cut = batches.batch(0, 1)
    assert cut.cu_seqlens.tolist() == [0, 3, 13]
    assert cut.labels[0, 3:].tolist() == [*none, *range(403, 411)]
    assert batches.num_batches == 3
    assert batches.batch(0, 2).cu_seqlens.tolist() == [0, 6]


def test_every_conversation_is_read_once_an_epoch_in_another_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 12, 40)
    talks = [talk(n, length) for n, length in enumerate(lengths)]

    def read(epoch: int, seed: int = 0) -> list[int]:
        source = ChatBatches(talks, seq_len=16, batch_size=3, shuffle=True, seed=seed)
        found = []
        for index in range(source.num_batches):
            batch = source.batch(epoch, index)
            assert batch.input_ids.shape[1] <= 3 * 16
            found += (batch.input_ids[0, batch.cu_seqlens[:-1]] // 100).tolist()
        return found

    assert sorted(read(0)) == sorted(read(1)) == list(range(40))
    assert read(0) == read(0) != read(1)
    assert read(0) != read(0, seed=1)


def test_conversations_in_a_row_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    layers = [{"type": "based", "num_heads": 2, "feature_dim": 4}, {"type": "base_conv"}]
    model = MemoryLM(ModelConfig(vocab_size=700, d_model=16, layers=layers), dtype=torch.float64)
    talks = [talk(0, 6), talk(1, 5)]
    batch = ChatBatches(talks, seq_len=20, batch_size=1).batch(0, 0)
    packed = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits[0, 5:]
    alone = model(torch.from_numpy(talks[1].tokens[None, :-1])).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-10, rtol=0)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}! " * n}]}
        for n in range(1, 31)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    return tmp_path


SETTINGS: dict[str, Any] = {"tokenizer": "bytes", "chat_template": plain(TEMPLATES["header"])}


def test_the_data_module_reads_files_and_data_sets_alike(
    rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    from_file = ChatDataModule(files="talks.jsonl", seq_len=100, batch_size=2, **SETTINGS)
    source = DatasetSource(path="json", data_files="talks.jsonl")
    from_rows = ChatDataModule(dataset=source, seq_len=100, batch_size=2, **SETTINGS)
    for module in (from_file, from_rows):
        module.setup()
    ours, theirs = list(from_file.train_dataloader()), list(from_rows.train_dataloader())
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
    (held_out,) = from_file.val_dataloader()
    assert len(held_out.cu_seqlens) == 2, "one conversation in twenty, at least one"
    assert "16 of 30 conversations are cut to 100 tokens" in caplog.text, "those of 4 n + 44 > 101 bytes"


def test_conversations_without_a_reply_are_left_out(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with (rows / "talks.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"messages": TALK[:1]}))
    module = ChatDataModule(files="talks.jsonl", val_files="talks.jsonl", **SETTINGS)
    module.setup()
    assert "1 conversations are left out" in caplog.text
    with pytest.raises(ValueError, match="no training conversation in which the assistant says something"):
        ChatDataModule(files="talks.jsonl", seq_len=3, **SETTINGS).setup()


def test_bad_settings_are_refused(rows: Path) -> None:
    with pytest.raises(ValueError, match="no conversations to train on"):
        ChatDataModule(**SETTINGS)
    with pytest.raises(ValueError, match=r"is not a \.jsonl file"):
        ChatDataModule(files="talks.txt", **SETTINGS)
    with pytest.raises(ValueError, match="no file"):
        ChatDataModule(files="missing.jsonl", **SETTINGS)
    with pytest.raises(ValueError, match="has no field 'chat'"):
        ChatDataModule(files="talks.jsonl", messages_field="chat", **SETTINGS).setup()
    with pytest.raises(ValueError, match="max_val_rows"):
        ChatDataModule(files="talks.jsonl", max_val_rows=0, **SETTINGS)
