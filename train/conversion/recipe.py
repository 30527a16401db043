"""Recipes of conversion: what to convert to, and the stages of training; read from YAML and checked against a
model before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ... import configs
from ...layers.contract import TokenMixer, suggest
from ...layers.registry import build_mixer
from ...models.config import ModelConfig
from ...models.conversion import (
    ConversionPlan,
    LayerSelection,
    WeightSource,
    converted_config,
    memory_off,
    weight_map,
    window_of,
)
from ...models.decoder import MemoryLM
from ..data.documents import names
from ..data.text_tasks import TextTask, make_text_task
from .data import DEFAULT_DATA, check_data
from .recipe_stage import Stage
from .updates import linear_layers, lora_size

_LAST_SEED = 2**32 - 1  # of numpy
DEFAULT_WINDOW = {"window_size": 64, "num_sinks": 4}


def _default_target() -> Mapping[str, Any]:
    return {
        "type": "lolcats",
        "window_size": 64,
        "num_sinks": 4,
        "feature_dim": 64,
        "is_affine": True,
        "initial_window_share": 0.99,
    }


def _default_stages() -> tuple[Stage, ...]:
    return (
        Stage(name="align", loss={"mixer_out": 1.0}, train="new", steps=40, lr=1e-2),
        Stage(name="tune", loss={"kl": 1.0}, train="lora", steps=110, lr=1e-3, new_lr_scale=10.0),
    )


@dataclass(frozen=True, kw_only=True)
class ConversionRecipe:
    """A staged conversion, as data.

    Attributes:
        target: the new mixer, `{type: ..., ...}`; heads and positions come from the attention it replaces.
        layers: blocks to convert, or `{method: uniform | even_odd | mse | loss, keep: share or number}` to
            choose those that keep their attention; None converts all.
        gqa: "keep" the key/value heads of the source, or "expand" them to one per query head.
        stages: stages of training, in order.
        control: window and sinks of the rows without a memory; None takes those of the target (64 and 4
            where it has none).
        data: the training text: arguments of a data module of `memzoo train` (its `type`, text unless given)
            without tokenizer and sizes.
        recall: what every row is asked beside its books: a task in English, its settings with `type` and
            `seq_len`, and `num_examples` (100). None asks nothing.
        seed: of initialisation and data order.
    """

    target: Mapping[str, Any] = field(default_factory=_default_target)
    layers: Sequence[int] | Mapping[str, Any] | LayerSelection | None = None
    gqa: str = "keep"
    stages: Sequence[Stage | Mapping[str, Any]] = field(default_factory=_default_stages)
    control: Mapping[str, int] | None = None
    data: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_DATA))
    recall: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.layers, Mapping):
            object.__setattr__(self, "layers", _from_mapping(LayerSelection, self.layers, "layers"))
        if isinstance(self.layers, Sequence) and not self.layers:
            raise ValueError("layers must name a block, got []. Leave layers out to convert all.")
        self.plan  # noqa: B018  # raises on an impossible target
        if not isinstance(self.stages, Sequence) or isinstance(self.stages, str):
            raise ValueError(f"stages must be a list of stages, got {self.stages!r}.")
        stages = tuple(
            stage if isinstance(stage, Stage) else _from_mapping(Stage, stage, f"stage {number}")
            for number, stage in enumerate(self.stages)
        )
        object.__setattr__(self, "stages", stages)
        names = [stage.name for stage in stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages must have names of their own, got {names}.")
        largest = _LAST_SEED - len(stages)  # each stage has its own, counted from this one
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= largest:
            raise ValueError(f"seed must be an integer from 0 to {largest}, got {self.seed!r}.")
        if not isinstance(self.data, Mapping):
            raise ValueError(f"data must be a mapping, got {self.data!r}. Write {{texts: [NAME, ...]}}.")
        if self.recall is not None:
            recall_task(self.recall)
        if self.control is not None:
            wrong = not isinstance(self.control, Mapping) or not set(self.control) <= set(DEFAULT_WINDOW)
            if wrong or "window_size" not in self.control:
                raise ValueError(
                    f"control must give window_size and may give num_sinks, got {self.control!r}. "
                    "Write {window_size: 64, num_sinks: 4}."
                )

    @property
    def plan(self) -> ConversionPlan:
        """What is converted."""
        assert not isinstance(self.layers, Mapping)
        return ConversionPlan(target=self.target, layers=self.layers, gqa=self.gqa)

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """The stages, typed."""
        return tuple(stage for stage in self.stages if isinstance(stage, Stage))

    @property
    def last_end_to_end(self) -> Stage | None:
        """The stage whose training the control repeats."""
        learns = (
            stage for stage in reversed(self.all_stages) if set(stage.loss) & {"kl", "reverse_kl", "ce"}
        )
        return next(learns, None)


def recall_task(recall: Mapping[str, Any]) -> tuple[TextTask, int]:
    """The task of a recipe's `recall`, and how many contexts are asked.

    Raises:
        ValueError: no mapping, an unknown task or setting (the nearest is named), or an impossible value.
    """
    if not isinstance(recall, Mapping):
        raise ValueError(
            f"recall must be a mapping, got {recall!r}. Write {{type: needle_text, seq_len: N}}."
        )
    settings = {"num_examples": 100, "seq_len": 512, **recall}
    num_examples, seq_len = settings.pop("num_examples"), settings.pop("seq_len")
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise ValueError(f"recall: num_examples must be an integer of at least 1, got {num_examples!r}.")
    return make_text_task(settings, seq_len=seq_len), num_examples


def recipe_dict(recipe: ConversionRecipe) -> dict[str, Any]:
    """The recipe as plain data, for a record or a file."""
    return asdict(recipe) | {"target": dict(recipe.target)}


def shown_recipe(recipe: ConversionRecipe) -> dict[str, Any]:
    """The recipe as plain data for others to read: of absolute paths in it only the last part."""

    def shown(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shown(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shown(item) for item in value]
        is_place = isinstance(value, str) and "\n" not in value and Path(value).is_absolute()
        return Path(value).name if is_place else value

    plain: dict[str, Any] = shown(recipe_dict(recipe))
    return plain


def read_recipe(
    name: str,
    *,
    steps: Mapping[str, int] | None = None,
    loss: Mapping[str, Mapping[str, float]] | None = None,
    **changes: Any,
) -> ConversionRecipe:
    """A shipped recipe by name, or one from a YAML file.

    Args:
        name: of the recipe or the file.
        steps: stage -> number of steps, in place of those of the recipe.
        loss: stage -> loss -> weight, in place of those of the recipe; losses not named keep theirs.
        changes: fields to replace; None leaves a field as it is.

    Raises:
        ValueError: no such recipe, an unknown key or stage (the nearest is suggested), or an impossible
            value.
    """
    path = (
        Path(name) if Path(name).suffix in (".yaml", ".yml") else configs.find(f"convert/{name}", "convert")
    )
    if not path.is_file():
        raise ValueError(
            f"there is no recipe file {name!r} (looked in {Path.cwd()}). Check the path. "
            f"{configs.suggestion(name, 'convert')}"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{name} is not a YAML file: {error}. Correct it there.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold a mapping of recipe fields, got {type(values).__name__}.")
    wanted = {key: value for key, value in changes.items() if value is not None}
    recipe: ConversionRecipe = _from_mapping(ConversionRecipe, {**values, **wanted}, f"recipe {name}")
    return with_losses(with_steps(recipe, steps or {}), loss or {})


def with_steps(recipe: ConversionRecipe, steps: Mapping[str, int]) -> ConversionRecipe:
    """The recipe with other numbers of steps in some stages.

    Raises:
        ValueError: a stage that the recipe does not have.
    """
    return _with_stages(recipe, {name: {"steps": number} for name, number in steps.items()})


def with_losses(recipe: ConversionRecipe, loss: Mapping[str, Mapping[str, float]]) -> ConversionRecipe:
    """The recipe with other weights of some losses in some stages; a weight of 0 leaves a loss out.

    Raises:
        ValueError: a stage that the recipe does not have, an unknown loss, or an impossible weight.
    """
    own = {stage.name: stage.loss for stage in recipe.all_stages}
    for name, weights in loss.items():
        if not isinstance(weights, Mapping):
            raise ValueError(
                f"stage {name!r}: losses must be a mapping, got {weights!r}. Write {{{name}: {{kl: 1.0}}}}."
            )
    return _with_stages(
        recipe, {name: {"loss": {**own.get(name, {}), **weights}} for name, weights in loss.items()}
    )


def _with_stages(recipe: ConversionRecipe, changes: Mapping[str, Mapping[str, Any]]) -> ConversionRecipe:
    """The recipe with fields of some stages replaced."""
    names = [stage.name for stage in recipe.all_stages]
    for name in changes:
        if name not in names:
            raise ValueError(f"the recipe has no stage {name!r}. {suggest(str(name), names)}")
    stages = [replace(stage, **changes.get(stage.name, {})) for stage in recipe.all_stages]
    return replace(recipe, stages=stages)


def check_recipe(recipe: ConversionRecipe, source: ModelConfig, *, with_control: bool = True) -> None:
    """Refuses a recipe that does not fit a model, before any work: all its models are built without weights.

    Args:
        recipe: what to check.
        source: the config of the model to convert.
        with_control: whether a control is to be trained as well.

    Raises:
        ValueError: layers outside the model, a target that is no valid mixer or lacks a memory that can be
            switched off or has other heads than the model, projections that no layer has, training windows
            that never leave the window of the mixer, a training text that is not there, or stages that train
            nothing.
    """
    plan = recipe.plan
    layers = plan.converted_layers(source.depth)
    if not recipe.all_stages:
        raise ValueError(
            "the recipe has no stages. Add one; steps: 0 leaves the model as the surgery made it."
        )
    selection = plan.layers if isinstance(plan.layers, LayerSelection) else None
    if not layers or (selection is not None and selection.num_kept(source.depth) == source.depth):
        raise ValueError("the recipe converts no block. Give fewer blocks to keep, or leave layers out.")
    for index in layers:
        replaced = source.mixers[index].to_dict()
        if "num_heads" not in replaced:
            raise ValueError(
                f"layer {index} of the source is {replaced['type']!r}, which has no heads of attention to "
                "take over. Convert a model of attention, or name only such blocks in layers."
            )
        for name in ("d_model", "num_heads", "head_dim"):
            if name in plan.target and recipe.target[name] != replaced.get(name):
                raise ValueError(
                    f"the target has {name}={recipe.target[name]!r}, the attention of layer {index} has "
                    f"{replaced.get(name)!r}. Leave {name} out to inherit it."
                )
        key_heads = recipe.target.get("num_kv_heads")
        if key_heads is not None and key_heads not in (
            replaced.get("num_kv_heads"),
            replaced.get("num_heads"),
        ):
            raise ValueError(
                f"the target has num_kv_heads={key_heads!r}, the attention of layer {index} has "
                f"{replaced.get('num_kv_heads')!r}. Leave num_kv_heads out to inherit it, or set gqa: expand."
            )
    hybrid = MemoryLM(converted_config(source, plan), device="meta")
    with memory_off(hybrid, layers):
        pass
    window = MemoryLM(converted_config(source, control_plan(recipe)), device="meta")
    if with_control and recipe.last_end_to_end is None:
        raise ValueError(
            "the recipe has no stage with the loss kl or ce, so there is no training that its control could "
            "repeat. Add one, or set --control false."
        )
    if plan.is_measured and not any(stage.is_alignment for stage in recipe.all_stages):
        raise ValueError("layers chosen by a measurement need an alignment stage before it. Add one.")
    inner = [mixer.type for mixer in getattr(hybrid.config.mixers[layers[0]], "mixers", ())]
    if plan.target["type"] == "parallel" and "sliding_window" in inner[1:]:
        raise ValueError(
            f"the window of a parallel target comes first, got {', '.join(inner)}. Move it to the front."
        )
    for stage in recipe.all_stages:
        if stage.train == "lora":
            _check_updates(stage, hybrid, window, with_control)
        _check_effect(stage, source, hybrid, layers)
    memoryless = window_of(plan.target)
    reach = memoryless["window_size"] + memoryless["num_sinks"] if memoryless else 0
    for stage in recipe.all_stages:
        if stage.seq_len <= reach:
            raise ValueError(
                f"stage {stage.name!r}: seq_len must be above window_size + num_sinks = {reach}, got "
                f"{stage.seq_len}: no token would ever reach the memory."
            )
    check_data(recipe.data)


def check_books(recipe: ConversionRecipe, books: Iterable[str]) -> None:
    """Raises ValueError for a book of the comparison that is in the training text too."""
    trained = set(names(recipe.data.get("texts", ())))
    for book in books:
        if book in trained:
            raise ValueError(
                f"the book {book!r} is in the training text: its perplexity would say little. Leave it out "
                "of --books, or out of data.texts."
            )


def check_guide(recipe: ConversionRecipe, guide: str) -> None:
    """Raises ValueError where no stage would learn from a guide."""
    if not any(stage.loss.get("kl") for stage in recipe.all_stages):
        raise ValueError(f"the guide {guide!r} has no effect: no stage has the loss kl. Leave it out.")


def control_plan(recipe: ConversionRecipe, num_sinks: int | None = None) -> ConversionPlan:
    """The same conversion without a memory: a window, with the sinks of the recipe unless given."""
    window = dict(recipe.control or window_of(recipe.target) or DEFAULT_WINDOW)
    if num_sinks is not None:
        window["num_sinks"] = num_sinks
    return ConversionPlan(target={"type": "sliding_window", **window}, layers=recipe.plan.layers)


def _check_effect(stage: Stage, source: ModelConfig, hybrid: MemoryLM, layers: Sequence[int]) -> None:
    """Refuses what a stage asks for and the new mixers do not have."""
    mixers = {index: hybrid.blocks[index].mixer for index in layers}
    where = f"stage {stage.name!r}"
    kind = next(iter(mixers.values())).config.type
    if stage.window_dropout and not any("window_size" in mixer.overridable for mixer in mixers.values()):
        raise ValueError(f"{where}: window_dropout has no effect, {kind} has no window. Leave it out.")
    for name in stage.sizes:
        if not any(name in mixer.overridable for mixer in mixers.values()):
            raise ValueError(f"{where}: sizes has {name}, which {kind} does not have. Leave it out.")
    has_new = any(_has_new(source, index, mixer) for index, mixer in mixers.items())
    if stage.train == "new" and stage.steps and not has_new:
        raise ValueError(
            f"{where}: train=new has nothing to train: every parameter of {kind} is taken over from the "
            "source. Use mixers."
        )
    if "capacity" in stage.loss:
        for index, mixer in mixers.items():
            if not hasattr(mixer, "retention_gate"):
                raise ValueError(
                    f"{where}: the loss capacity is for retention gates, which {mixer.config.type} (layer "
                    f"{index}) does not have. Take gated_attention, or leave it out."
                )
    if "attn_out" in stage.loss:
        for index, mixer in mixers.items():
            old = build_mixer(source.mixers[index]).to("meta")
            shapes = [_heads(old), _heads(mixer)]
            if None in shapes or shapes[0] != shapes[1]:
                raise ValueError(
                    f"{where}: the loss attn_out compares heads before their projection, which {kind} in the "
                    f"place of {old.config.type} (layer {index}) does not have alike. Use mixer_out."
                )


def _has_new(source: ModelConfig, index: int, mixer: TokenMixer) -> bool:
    """Whether a new mixer has parameters, or rows of them, that it does not take over."""
    known = weight_map(source.mixers[index], mixer.config)
    return any(name not in known or not isinstance(known[name], WeightSource) for name in mixer.state_dict())


def _heads(mixer: TokenMixer) -> torch.Size | None:
    """The shape of the heads' outputs, None for a mixer that does not give them."""
    x = torch.empty(1, 2, mixer.d_model, device="meta")
    found = mixer(x, return_extras=True).extras.get("head_outputs")
    return None if found is None else found.shape


def _check_updates(stage: Stage, hybrid: MemoryLM, window: MemoryLM, with_control: bool) -> None:
    names = {
        name.rpartition(".")[2] for name, module in hybrid.named_modules() if hasattr(module, "in_features")
    }
    for name in stage.lora_targets:
        if name == "lm_head" or not any(linear_layers(hybrid, [name])):
            raise ValueError(
                f"stage {stage.name!r}: lora_targets: the converted model has no linear layer {name!r} in "
                f"its blocks. {suggest(name, names - {'lm_head'})}"
            )
    if with_control and not lora_size(window, stage.lora_targets):
        raise ValueError(
            f"stage {stage.name!r}: lora_targets {list(stage.lora_targets)} name no linear layer of the "
            "control, which could then not be tuned. Add a projection of its attention, such as q_proj."
        )


def _from_mapping(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from plain data, with errors that name the place."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {values!r}. Write its keys in place.")
    known = {item.name for item in fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {where}. {suggest(str(key), known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from None
