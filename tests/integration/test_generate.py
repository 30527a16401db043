"""`memzoo generate --state`: books and conversations that are kept between processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from memzoo import cli
from memzoo.models.checkpoints.fetch import fetch_smollm2
from memzoo.models.config import ModelConfig
from memzoo.models.decoder import MemoryLM
from memzoo.models.hf import save_model
from memzoo.models.reading import load_reading, read_tokens
from memzoo.train.chat_turns import first_turn, next_turn
from memzoo.train.data.tokenizers import byte_tokenizer, load_tokenizer

MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention"},
    "sliding_window": {"type": "sliding_window", "window_size": 6, "num_sinks": 2},
    "lolcats": {"type": "lolcats", "window_size": 6, "feature_dim": 8},
    "based": {"type": "based", "feature_dim": 4},
}
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}[helpful]\n{% endif %}"
    "[{{ message['role'] }}] {{ message['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
BOOK = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money.\n"


def byte_model(mixer: str, seed: int = 0, can_end: bool = False) -> MemoryLM:
    """A random model that writes printable ASCII, so that its texts can be joined, and may end them."""
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=257,
        d_model=16,
        layers=[MIXERS[mixer]] * 2,
        mixer_defaults={"num_heads": 2},
        initializer_range=0.5,
    )
    model = MemoryLM(config)
    with torch.no_grad():
        model.lm_head.weight[:32] = 0
        model.lm_head.weight[127 : 256 if can_end else 257] = 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    words = byte_tokenizer()
    words.chat_template = TEMPLATE
    made = {}
    for name in MIXERS:
        made[name] = str(tmp_path_factory.mktemp(name) / "model")
        save_model(byte_model(name), made[name], words)
    return made


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `memzoo generate` and returns what it prints."""

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        assert cli.main(["generate", *arguments]) == status
        shown = capsys.readouterr()
        return shown.out.removesuffix("\n") if status == 0 else shown.err

    return run


def assert_same_state(path: str, folder: str, text: str) -> None:
    """What is in the file is what one reading of the whole text gives."""
    from memzoo.models.checkpoints.folder import load_model

    model, words = load_model(folder).eval(), load_tokenizer(folder)
    expected = read_tokens(model, torch.tensor(words.encode(text, add_special_tokens=False)))
    found = load_reading(path, model, words)
    for (name, one), (_, other) in zip(found.named_tensors(), expected.named_tensors(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_split_text_equals_an_uninterrupted_one(mixer: str, folders: dict[str, str], says: Any) -> None:
    model = ("--model", folders[mixer])
    whole = says(*model, "--prompt", BOOK + "He said", "--max_new_tokens", "14")
    assert len(whole) == 14
    small = (*model, "--chunk_size", "16")
    assert says(*small, "--prompt_file", "book.txt", "--prompt", "He said", "--max_new_tokens", "14") == whole
    read = says(*small, "--prompt_file", "book.txt", "--state", "s", "--max_new_tokens", "0")
    assert read.startswith(f"{len(BOOK)} tokens read; ")
    parts = says(*model, "--prompt", "He said", "--state", "s", "--max_new_tokens", "1")
    parts += says(*model, "--state", "s", "--max_new_tokens", "8")
    parts += says(*model, "--state", "s", "--max_new_tokens", "5")
    assert parts == whole
    assert_same_state("s", folders[mixer], BOOK + "He said" + whole)


def test_another_process_goes_on(folders: dict[str, str], says: Any) -> None:
    model = ("--model", folders["lolcats"])
    whole = says(*model, "--prompt", BOOK, "--max_new_tokens", "12")
    first = says(*model, "--prompt_file", "book.txt", "--state", "kept", "--max_new_tokens", "5")
    rest = ("--state", "kept", "--max_new_tokens", "7")
    done = subprocess.run(
        [sys.executable, "-m", "memzoo.cli", "generate", *model, *rest],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert first + done.stdout.removesuffix("\n") == whole


def test_beams_go_on_from_what_was_read(folders: dict[str, str], says: Any) -> None:
    model = ("--model", folders["based"])
    search = ("--num_beams", "3", "--max_new_tokens", "6")
    whole = says(*model, "--prompt", BOOK + "He said", *search)
    says(*model, "--prompt_file", "book.txt", "--state", "s", "--max_new_tokens", "0")
    assert says(*model, "--prompt", "He said", "--state", "s", *search) == whole
    assert_same_state("s", folders["based"], BOOK + "He said" + whole)


@pytest.mark.parametrize("beams", ["1", "3"])
def test_written_tokens_are_counted(
    beams: str, folders: dict[str, str], says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--model", folders["based"], "--prompt", BOOK, "--num_beams", beams, "--max_new_tokens", "4")
    text = says(*arguments)
    seen: list[tuple[int, int]] = []
    line = lambda unit: lambda done, total: seen.append((done, total))  # noqa: E731
    monkeypatch.setattr("memzoo.train.generate_command.progress_line", line)
    assert says(*arguments) == text
    assert seen[-5:] == [(count, 4) for count in (1, 2, 3, 4, 4)]


def test_each_call_samples_with_its_own_seed(folders: dict[str, str], says: Any, workplace: Path) -> None:
    model = ("--model", folders["attention"], "--temperature", "1.5", "--max_new_tokens", "10")
    says(*model, "--prompt_file", "book.txt", "--state", "s", "--seed", "5")
    kept = (workplace / "s").read_bytes()
    texts = []
    for seed in ("1", "1", "2"):
        (workplace / "s").write_bytes(kept)
        texts.append(says(*model, "--state", "s", "--seed", seed))
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("mixer", ["sliding_window", "based"])
def test_turns_make_one_rendering(mixer: str, folders: dict[str, str], says: Any, workplace: Path) -> None:
    """Whether a reply ends by itself or is cut off, and with a default system prompt on the first turn."""
    words = load_tokenizer(folders[mixer])
    save_model(byte_model(mixer, can_end=True), "talker", words)
    model = ("--model", "talker", "--chat", "--state", "talk")
    model += ("--temperature", "1", "--top_k", "25", "--max_new_tokens", "30")
    has_ended = set()
    for seed in range(30):
        (workplace / "talk").unlink(missing_ok=True)
        reply = says(*model, "--prompt", "Hi there", "--seed", str(seed))
        has_ended.add(len(reply) < 30)
        if len(has_ended) == 1 and seed:
            continue
        answer = says(*model, "--prompt", "And more", "--seed", str(seed))
        talk = [
            {"role": "user", "content": "Hi there"},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": "And more"},
        ]
        whole = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) + answer
        end = words.eos_token if len(answer) < 30 else ""
        assert whole.count("[helpful]") == 1
        assert_same_state("talk", "talker", whole + end)
        if len(has_ended) == 2:
            break
    assert has_ended == {True, False}


def test_a_book_may_come_before_a_conversation(folders: dict[str, str], says: Any) -> None:
    model = ("--model", folders["based"], "--state", "s")
    says(*model, "--prompt_file", "book.txt", "--max_new_tokens", "0")
    reply = says(*model, "--chat", "--prompt", "Who?", "--max_new_tokens", "4")
    words = load_tokenizer(folders["based"])
    assert_same_state("s", folders["based"], BOOK + first_turn(words, "Who?") + reply)
    again = says(*model, "--chat", "--prompt", "Why?", "--max_new_tokens", "4")
    text = BOOK + first_turn(words, "Who?") + reply + next_turn(words, "Why?") + again
    assert_same_state("s", folders["based"], text)


@pytest.mark.checkpoint
def test_turns_of_smollm2_are_the_tokens_of_one_rendering() -> None:
    """Its template adds a system prompt in front of the first turn alone."""
    words = load_tokenizer(str(fetch_smollm2()))

    def ids(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False)

    talk = [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": " It's 4, of course.\n"},
        {"role": "user", "content": "  And 10-3?\n"},
    ]
    parts = ids(first_turn(words, talk[0]["content"])) + ids(talk[1]["content"])
    parts += ids(next_turn(words, talk[2]["content"]))
    whole = words.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert "named SmolLM" in whole
    assert parts == ids(whole)


def test_a_state_of_another_model_is_refused(folders: dict[str, str], says: Any, workplace: Path) -> None:
    says("--model", folders["based"], "--prompt", "x", "--state", "s", "--max_new_tokens", "2")
    kept = (workplace / "s").read_bytes()
    go_on = ("--prompt", "y", "--state", "s")
    assert "its config is not the one here" in says("--model", folders["lolcats"], *go_on, status=2)
    low = ("--model", folders["based"], "--dtype", "bfloat16")
    assert "its dtype (float32, here bfloat16)" in says(*low, *go_on, status=2)
    words = byte_tokenizer()
    words.add_tokens(["more"])
    words.save_pretrained("other")
    other = ("--model", folders["based"], "--tokenizer", "other")
    assert "its tokenizer is not the one here" in says(*other, *go_on, status=2)
    save_model(byte_model("based", seed=1), "tuned", byte_tokenizer())
    assert "its weights are not those here" in says("--model", "tuned", *go_on, status=2)
    assert (workplace / "s").read_bytes() == kept


def test_files_that_are_no_whole_state_are_refused(
    folders: dict[str, str], says: Any, workplace: Path
) -> None:
    model = ("--model", folders["based"])
    says(*model, "--prompt", "x", "--state", "s", "--max_new_tokens", "2")
    kept = bytearray((workplace / "s").read_bytes())
    go_on = (*model, "--prompt", "y", "--state", "s")
    (workplace / "s").write_bytes(kept[: len(kept) // 2])
    assert "not a readable state file" in says(*go_on, status=2)
    kept[-3] ^= 4
    (workplace / "s").write_bytes(kept)
    assert "differs from its SHA-256" in says(*go_on, status=2)
    (workplace / "s").write_text("not a state")
    assert "not a readable state file" in says(*go_on, status=2)
    assert (workplace / "s").read_text() == "not a state"


def test_a_full_disk_loses_neither_text_nor_state(
    folders: dict[str, str], says: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", folders["based"], "--state", "s", "--max_new_tokens", "4")
    says(*model, "--prompt", "x")
    kept = (workplace / "s").read_bytes()
    expected = says(*model)
    (workplace / "s").write_bytes(kept)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("memzoo.layers.contract.state.os.fsync", full)
    shown = says(*model, status=2)
    assert "cannot be written to 's' (No space left on device)" in shown
    assert " ".join(repr(expected).split()) in shown
    assert (workplace / "s").read_bytes() == kept
    assert sorted(path.name for path in workplace.iterdir()) == ["book.txt", "s"]


def test_mistakes_are_found_before_the_model_is_loaded(
    folders: dict[str, str], says: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memzoo.train import generate_command

    model = ("--model", folders["based"])
    ended = ("--state", "ended")
    save_ended(folders["based"])
    with monkeypatch.context() as patch:
        patch.setattr(generate_command, "load_for_use", lambda *a: pytest.fail("the model was loaded"))
        for message, *arguments in (
            ("there is nothing to read",),
            ("there is nothing to read", "--state", "new"),
            ("there is nothing to read", "--chat", *ended),
            ("0 only reads and needs --state", "--prompt", "x", "--max_new_tokens", "0"),
            ("there is nothing to do", "--max_new_tokens", "0", *ended),
            ("must be at least 1, got -1", "--prompt", "x", "--max_new_tokens", "-1"),
            ("num_beams must be at least 1", "--prompt", "x", "--num_beams", "0"),
            ("chunk_size must be at least 1", "--prompt", "x", "--chunk_size", "0"),
            ("must be finite and not negative, got nan", "--prompt", "x", "--temperature", ".nan"),
            ("top_p above 0 and at most 1, got 0 and 2.0", "--prompt", "x", "--top_p", "2"),
            ("top_k must be at least 0", "--prompt", "x", "--top_k", "-1"),
            ("--prompt: character 1 of the text is \\udcff", "--prompt", "a\udcff"),
            ("the tokenizer in 'broken' cannot be read", "--prompt", "x", "--tokenizer", "broken"),
            ("there is no file 'bok.txt'", "--prompt_file", "bok.txt"),
            ("not UTF-8 text", "--prompt_file", "binary"),
            ("the prompt is empty", "--prompt", ""),
            ("the prompt is empty", "--chat", "--prompt", ""),
            ("Name a file for it", "--prompt", "x", "--state", "."),
            ("results cannot be written", "--prompt", "x", "--state", "book.txt/s"),
        ):
            (workplace / "binary").write_bytes(b"\xff\xfe\x00")
            (workplace / "broken").mkdir(exist_ok=True)
            (workplace / "broken" / "tokenizer.json").write_text("{")
            assert message in says(*model, *arguments, status=2), arguments
        strict = byte_tokenizer()
        strict.chat_template = "{{ raise_exception('roles must alternate') }}"
        strict.save_pretrained("strict")
        refused = says(*model, "--tokenizer", "strict", "--chat", "--prompt", "x", status=2)
        assert "the chat template refuses the turn: roles must alternate" in refused
        byte_tokenizer().save_pretrained("plain")
        plain = (*model, "--tokenizer", "plain", "--chat", "--prompt", "x")
        assert "the tokenizer has no chat template" in says(*plain, status=2)
    assert "has come to its end (<|endoftext|>)" in says(*model, *ended, status=2)


def save_ended(folder: str) -> None:
    from memzoo.models.checkpoints.folder import load_model
    from memzoo.models.reading import save_reading

    model, words = load_model(folder).eval(), load_tokenizer(folder)
    save_reading(read_tokens(model, torch.tensor([65, 66, words.eos_token_id])), "ended", model, words)
