"""The model card of a converted model: what it is made of, how it was trained, what it was measured at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from ... import __version__
from ..data.documents import names
from .comparison import Row, comparison_table
from .recipe import ConversionRecipe, shown_recipe
from .workshop import Conversion


def model_card(
    source: str,
    recipe: ConversionRecipe,
    rows: Sequence[Row],
    conversion: Conversion,
    *,
    is_control: bool = False,
    guide: str | None = None,
) -> str:
    """The README.md of a model folder, with the front matter that model hubs read.

    Args:
        source: the pretrained model, as the user named it; of a path only the last part is said.
        recipe: how it was converted.
        rows: of the comparison.
        conversion: the model.
        is_control: whether it is the control of a conversion instead of the hybrid.
        guide: the larger model that it learned from, as the user named it.
    """
    base = Path(source).resolve().name
    front = yaml.safe_dump(
        {
            "library_name": "memzoo",
            "base_model": base,
            "base_model_relation": "finetune",
            "pipeline_tag": "text-generation",
            "tags": ["memzoo", "long-context", str(recipe.target["type"])],
        },
        sort_keys=False,
    )
    what = (
        "The control of a conversion: windows with sinks in place of the memory, trained on the same text"
        if is_control
        else f"A hybrid with `{recipe.target['type']}` mixers, converted"
    )
    layers = conversion.report.layers
    data = recipe.data
    texts = ", ".join(
        [*names(data.get("texts", ())), *(Path(file).name for file in names(data.get("files", ())))]
    )
    if "dataset" in data:
        texts = ", ".join(filter(None, [texts, f"data set {Path(str(data['dataset'].get('path'))).name}"]))
    stages = "\n".join(
        f"| {facts.name} | {facts.steps:,} | {facts.num_tokens:,} "
        f"| {sum(facts.trained.values()) + facts.num_low_rank:,} |"
        for facts in conversion.stages
    )
    measured = (
        "Perplexity per token on books that were not trained on; every window starts with an empty memory; "
        f"all rows are measured in bfloat16.\n\n```\n{comparison_table(rows)}\n```"
        if rows and rows[0].losses
        else "No comparison was asked for."
    )
    is_merged = any(facts.num_low_rank and facts.steps for facts in conversion.stages)
    merged = "Low-rank updates are merged into the weights.\n" if is_merged else ""
    learned = f" The distribution learned (kl) is that of `{Path(guide).resolve().name}`." if guide else ""
    settings = json.dumps(shown_recipe(recipe), indent=2, default=str)
    return f"""---
{front}---

# {base} as a memory hybrid{" (control)" if is_control else ""}

{what} from `{base}` with memzoo {__version__}. Converted blocks: {", ".join(map(str, layers))}.
{merged}
```python
import memzoo.models.hf  # registers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

or `memzoo.load("FOLDER")`.

## Training

Text: {texts}.{learned} Licence and limits of the source model apply to this one too.

| stage | steps | tokens | trained numbers |
|---|---|---|---|
{stages}

## Measured

{measured}

## Recipe

```json
{settings}
```
"""
