"""Write docs/recipes.md from the dataclasses: `.venv/bin/python tests/support/recipe_docs.py`."""

import textwrap
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from pipeline.recipe import DEFAULTS, RECIPE_GROUPS, STREAMING_DEFAULTS
from pipeline.recipe_checks import NON_SEMANTIC_KEYS

FILE = Path(__file__).parents[2] / "docs/recipes.md"
HEADER = """\
# Recipes

A recipe is a YAML file with the settings of one experiment: one of `pipeline/recipes` by its name
(`RECIPE=cpu`), a file of your own (`RECIPE=mine.yaml`), or that of a published model
(`RECIPE=hub:you/vit-cifar10@v1`). Each key can be overridden on the command line, as in
`ARGS="--learning_rate=2e-4"`. All values are checked before anything is loaded.

Included are `vit-base` (the default) and `dinov2-small`, which are for a GPU, `cpu` and `demo`.

This page is written from the dataclasses in [`pipeline/recipe.py`](../pipeline/recipe.py) by
`.venv/bin/python tests/support/recipe_docs.py`.
"""
FOOTER = """
## Training

The other keys are those of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer), such as
`num_train_epochs`, `learning_rate` or `bf16`. They are documented there. Their defaults are those
of transformers, except for:

| Key | Default |
|:--|:--|
{defaults}

With `streaming: true`, {streaming}.

The following keys affect only speed, hardware and reporting. A run can be resumed under other
values of them. They are neither saved in `recipe.yaml` nor published:

{speed}
"""


def render() -> str:
    """Return the page."""
    text = HEADER
    for group in RECIPE_GROUPS:
        text += f"\n## {group.__name__.removesuffix('Arguments')}\n\n{group.__doc__}\n\n"
        text += "| Key | Type | Default | Meaning |\n|:--|:--|:--|:--|\n"
        kinds = get_type_hints(group)  # HfArgumentParser changes `field.type`
        for key in fields(group):
            kind = kinds[key.name]
            kind = (kind.__name__ if isinstance(kind, type) else str(kind)).replace(" | ", " or ")
            default = "" if key.default is None else f"`{_yaml(key.default)}`"
            text += f"| `{key.name}` | {kind} | {default} | {key.metadata['help']} |\n"
    defaults = "\n".join(f"| `{key}` | `{_yaml(value)}` |" for key, value in DEFAULTS.items())
    speed = ", ".join(f"`{key}`" for key in sorted(NON_SEMANTIC_KEYS))
    speed = "\n".join(textwrap.wrap(speed, 100, break_on_hyphens=False))
    streaming = [f"`{key}` is `{value}`" for key, value in STREAMING_DEFAULTS.items()]
    return text + FOOTER.format(defaults=defaults, speed=speed, streaming=", ".join(streaming))


def _yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    FILE.write_text(render(), "utf-8")
