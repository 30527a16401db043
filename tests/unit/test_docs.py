"""The pages say what is true: links, commands, names, tables and examples are checked against the code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from memzoo import cli, configs
from memzoo.layers import list_mixers, mixer_config
from memzoo.layers.policies import PRESETS as POLICIES
from memzoo.layers.presets import PRESETS
from memzoo.layers.registry import _MIXERS
from memzoo.models.config import MLP_TYPES
from memzoo.records import write_record

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/*.md"))]
EXAMPLES = [
    "docs/evaluate.md",
    "docs/models.md",
    "docs/policies.md",
    *(
        f"docs/mixers/{page.name}"
        for page in sorted((ROOT / "docs" / "mixers").glob("*.md"))
        if "```python" in page.read_text(encoding="utf-8")
    ),
]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("cost_tables", ROOT / "tools" / "cost_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """Every `memzoo ...` of a page as words, from shell blocks and from inline code."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").split("\n"):
            if line.startswith("memzoo "):
                yield shlex.split(line, comments=True)[1:]
    for code in re.findall(r"`(memzoo [a-z][^`]*)`", prose(page)):
        yield shlex.split(code)[1:]


def command_problems(words: list[str]) -> list[str]:
    """What is wrong with a command line, by the table of commands and the signatures behind it."""
    words = [word for word in words if word not in ("--debug", "--help", "COMMAND", "...")]
    if not words or words == ["--version"]:
        return []
    name, rest = words[0], words[1:]
    if name not in cli.COMMANDS:
        return [f"no command {name!r}"]
    target = cli.COMMANDS[name].target
    found = []
    if name == "train":
        if rest and rest[0] not in ("fit", "validate", "test"):
            found.append(f"train has no {rest[0]!r}")
        known = {
            "config",
            "print_config",
            "ckpt_path",
            "output",
            "overwrite",
            "seed_everything",
            "model",
            "data",
            "trainer",
        }
    elif not isinstance(target, str):
        if not rest:
            return []
        if rest[0] not in target:
            return [f"{name} has no {rest[0]!r}"]
        known = parameters(target[rest[0]])
        rest = rest[1:]
    else:
        known = parameters(target)
    if name != "train" and rest and not rest[0].startswith("-"):
        found.append(f"{name} takes flags, not {rest[0]!r}")
    flags = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    found += [f"{name} has no --{flag}" for flag in flags if flag.split(".")[0] not in known]
    for flag, value in zip(rest, rest[1:], strict=False):
        if flag in ("--config", "--model") and re.fullmatch(r"(train|models)/\w+", value):
            found += [] if value in configs.names() else [f"no configuration {value!r}"]
        if flag == "--recipe" and "." not in value and f"convert/{value}" not in configs.names():
            found.append(f"no recipe {value!r}")
    return found


def parameters(target: str) -> set[str]:
    module, _, function = target.partition(":")
    return set(inspect.signature(getattr(importlib.import_module(module), function)).parameters) | {"config"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    assert {" ".join(words): found for words in commands(page) if (found := command_problems(words))} == {}


def test_the_check_of_commands_can_fail() -> None:
    for line in (
        "trian fit", "train fti", "inspect --modle x", "evaluate perplxity", "list mixers",
        "train fit --config train/nothing", "convert --recipe nothing",
    ):  # fmt: skip
        assert len(command_problems(line.split())) == 1, line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named <= targets, sorted(named - targets)
    scripts = set(re.findall(r"\b((?:benchmarks|tools)/\w+\.py)\b", text))
    assert all((ROOT / script).is_file() for script in scripts), sorted(scripts)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_types_are_registered(page: Path) -> None:
    from memzoo.train.command_line import DATA_TYPES, MODEL_TYPES
    from memzoo.train.data.tasks import TASKS
    from memzoo.train.data.text_tasks import TEXT_TASKS

    text = page.read_text(encoding="utf-8")
    own = set(re.findall(r"register_mixer\(\"(\w+)\"", text))
    mixers = {*list_mixers(), *POLICIES, *MLP_TYPES}
    known = {*mixers, *DATA_TYPES, *MODEL_TYPES, *TASKS, *TEXT_TASKS, *own}
    named = set(re.findall(r"\btype\"?: \"?(\w+)\"?(?=[,}\n])", text))
    assert named <= known, sorted(named - known)


def test_every_mixer_has_fields_and_a_line() -> None:
    folder = ROOT / "docs" / "mixers"
    index = (folder / "index.md").read_text(encoding="utf-8")
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md")))
    for name in list_mixers():
        assert f"| `{name}` |" in index
        fields = PRESETS[name].base if name in PRESETS else name
        assert f"<!-- table: fields {fields} -->" in text
    for base in {preset.base for preset in PRESETS.values()}:
        assert f"<!-- table: presets {base} -->" in text


def test_members_are_valid_configs() -> None:
    import yaml

    found = 0
    for page in sorted((ROOT / "docs" / "mixers").glob("*.md")):
        for entry in re.findall(r"^\| .* \| `(\{type: .*\})` \|$", page.read_text(), flags=re.MULTILINE):
            mixer_config({"d_model": 1024, **yaml.safe_load(entry)})
            found += 1
    assert found > 15


def test_refused_modes_are_listed() -> None:
    from memzoo.models.hf import _REFUSED

    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in _REFUSED if f"`{name}`" not in text] == []


def test_configurations_are_listed() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in configs.names() if f"`{name.removeprefix('convert/')}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_current(page: Path, tool: ModuleType) -> None:
    text = page.read_text(encoding="utf-8")
    assert tool.refreshed(text, page) == text, "run python tools/cost_tables.py"


def test_figures_are_current(tool: ModuleType) -> None:
    for name in tool.SUBJECTS:
        found = tool.figure_data(tool.FIGURES / f"{name}.svg")
        assert found == tool.state_curves(name), "run python tools/cost_tables.py"
    for path, data, _ in tool.record_tables.figures():
        assert tool.figure_data(path) == data, "run python tools/cost_tables.py"


def test_measured_tables_come_from_records(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "docs" / "mixers" / "attention.md"
    monkeypatch.setattr(tool.record_tables, "RECORDS", tmp_path)
    measured = ("recall", "decoding", "loading", "conversion", "stateful", "training_memory", "records")
    assert [tool.TABLES[name]("", page) for name in measured] == [""] * 7
    assert list(tool.record_tables.figures()) == []
    assert tool.TABLES["kernels"]("linear", page) == ""

    def record(name: str, results: dict[str, object]) -> None:
        write_record(tmp_path / f"{name}.json", name=name, config={}, results=results, command=f"make {name}")

    run = {"configuration": "train/mqar_based", "test_accuracy": 0.957, "seconds": 120.0}
    record("mqar", {"runs": [run, {**run, "test_accuracy": 0.941, "seconds": 130.0}]})
    step = {"model": "small attention", "context": 4096, "ms_per_token": 1.25, "state_bytes": 2_000_000}
    record("decode", {"step": [step, {**step, "model": "small lolcats"}], "generate": []})
    row = {
        "num_trained": 12_345,
        "state_num_bytes": {"1024": 10, "32768": 20, "1000000": 30},
        "books": {"emma": {"perplexity": 33.333}},
    }
    pair = {"mean": 0.0312, "num_pairs": 8, "confidence": 0.95, "t_low": 0.01, "t_high": 0.05}
    record("demo", {"rows": {"hybrid": row}, "differences": {"control - hybrid": {"emma": pair}}})
    asked = {**row, "books": {}, "recall": {"accuracy": 0.8125, "accuracy_standard_error": 0.02}}
    record("convert_asked", {"rows": {"hybrid": asked}, "differences": {"control - hybrid": {}}})
    timed = {"function": "window 64", "setting": {"tokens": 1024}, "median_ms": 3.25}
    left_out = {"function": "sdpa", "setting": {"tokens": 32768}, "skipped": "too large"}
    record("kernels", {"linear": [timed, left_out]})

    run = {"arm": "carried", "near_accuracy": 1.0, "far_accuracy": 0.953, "cpu_seconds": 20.0}
    record("stateful", {"chance": 0.0625, "runs": [run, {**run, "far_accuracy": 0.97}]})
    case = {
        "model": "window",
        "tokens": 16384,
        "chunked": True,
        "recompute": False,
        "fits": True,
        "layers": 4,
    }
    cases = [
        {**case, "peak_bytes": 3 << 30, "tensor_bytes": 2 << 30},
        {**case, "chunked": False, "fits": False},
    ]
    write_record(
        tmp_path / "training_memory.json",
        name="training_memory",
        config={"limit_gib": 18.0},
        results={"cases": cases},
        command="make memory",
    )

    assert "| carried | 100.0%, 100.0% | 95.3%, 97.0% | 20 |" in tool.TABLES["stateful"]("", page)
    memory = tool.TABLES["training_memory"]("", page)
    assert "| 16,384 | window | over 18 GiB |  | 3.00 GiB (2.00) |  |" in memory
    ((path, data, draw),) = tool.record_tables.figures()
    draw(tmp_path / path.name, data)
    assert tool.figure_data(tmp_path / path.name) == data
    assert "| `train/mqar_based` | 95.7%, 94.1% | 125 |" in tool.TABLES["recall"]("", page)
    decoding = tool.TABLES["decoding"]("attention$", page)
    assert "| small attention | 4,096 | 1.25 |  | 2 MB |" in decoding
    assert "lolcats" not in decoding
    assert "../../benchmarks/records/decode.json" in decoding
    assert "`make decode`" in decoding
    sizes = {"weight_bytes": 2_000_000, "peak_anonymous_bytes": 2_100_000, "peak_anonymous_ratio": 1.05}
    loaded = {"reader": "memzoo.load", "source": "GGUF", "dtype": "float32", "cpu_seconds": 1.5, **sizes}
    record("loading", {"rows": [loaded], "bounds": []})
    loading = tool.TABLES["loading"]("", page)
    assert "| GGUF | float32 | `memzoo.load` | 2 MB | 2.1 MB | 1.05 | 1.50 |" in loading
    conversion = tool.TABLES["conversion"]("", page)
    assert "| hybrid | 33.33 | 10 B | 20 B | 30 B | 12,345 |" in conversion
    assert "| hybrid | 81.2% (2.0%) | 10 B | 20 B | 30 B | 12,345 |" in conversion
    assert "control - hybrid, emma: +0.0312 nats per token over 8 windows" in conversion
    kernels = tool.TABLES["kernels"]("linear", page)
    assert "| window 64 | 1024 | 3.25 |" in kernels
    assert "| sdpa | 32768 | left out: too large |" in kernels
    assert tool.TABLES["records"]("", page).count("\n") == 10


def test_yaml_blocks_are_yaml() -> None:
    import yaml

    from memzoo.models.config import ModelConfig
    from memzoo.train.conversion.recipe import ConversionRecipe

    for page in PAGES:
        for block in blocks(page, "yaml"):
            content = yaml.safe_load(block)
            if "layers" in content and "target" not in content:
                layers = content["layers"]
                given = {"vocab_size": 8, "d_model": 1024, "mixer_defaults": {"num_heads": 16}}
                if isinstance(layers, dict) and "pattern" not in layers:
                    given["num_layers"] = 12
                ModelConfig.from_dict(given | content)
            elif "target" in content:
                ConversionRecipe(**content)


def test_the_script_for_mixers_of_ones_own_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = blocks(ROOT / "docs" / "add-a-mixer.md", "python")
    (tmp_path / "run.py").write_text(script, encoding="utf-8")
    (tmp_path / "my_memory.py").write_text(
        "from memzoo.layers.registry import mixer_entry, register_mixer\n"
        "entry = mixer_entry('based')\n"
        "register_mixer('my_memory', entry.mixer, entry.config)\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "{vocab_size: 8, d_model: 8, layers: [{type: my_memory, num_heads: 1}]}"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("memzoo.layers.registry._MIXERS", dict(_MIXERS))
    monkeypatch.setattr(sys, "argv", ["run.py", "inspect", "--model", "mine.yaml"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("run.py")
    sys.modules.pop("my_memory")
    assert stop.value.code == 0
    assert "my_memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks(ROOT / name, "python")
    assert examples
    script = tmp_path / "examples.py"
    script.write_text("\n".join(examples), encoding="utf-8")
    runpy.run_path(str(script))
