"""Render the model card from a template and the results. It depends only on published files.

See https://huggingface.co/docs/hub/model-cards for the metadata.
"""

import difflib
import json
import re
from itertools import islice
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = Path(__file__).with_name("card.md")
SHOWN_LINES, SHOWN_WIDTH = 6, 100  # lines shown where two cards differ, and their length


def render(results: dict, repo: str, publication: dict, faithfulness: dict | None = None) -> str:
    """Return the card's text.

    Args:
        results: The content of the published `evaluation_results.json`.
        repo: The repository, as `owner/name`.
        publication: The content of `publication.json`: the `files` by path, the `license` with its
            `license_name` and `license_link`, `code_url`, `space`, `dashboard`, `onnx` (the content
            of `onnx.json`), and the `examples`, which map image paths to rows of the evaluated
            split.
        faithfulness: The content of `attention_faithfulness.json`.
    """
    facts = {"results": results, "publication": publication, "faithfulness": faithfulness}
    functions = {"percent": percent, "short_name": short_name, "plain": plain, "as_json": as_json}
    card = ModelCard.from_template(
        ModelCardData(), template_path=TEMPLATE, repo=repo, **facts, **functions
    )
    return str(card).rstrip() + "\n"


def mismatches(text: str, expected: str) -> list[str]:
    """Return the first lines where a card differs from the expected one, as in a unified diff."""
    diff = difflib.unified_diff(expected.splitlines(True), text.splitlines(True), n=0)
    lines = (line.rstrip()[:SHOWN_WIDTH] for line in islice(diff, 2, None) if line[0] in "+-")
    return list(islice(lines, SHOWN_LINES))


def percent(ratio: float) -> str:
    """Format a ratio as a percentage: 0.953 as "95.30 %"."""
    return f"{100 * ratio:.2f} %"


def plain(text: str) -> str:
    """Return text as one line of Markdown that shows it literally."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))


def as_json(value) -> str:
    """Return a value as JSON, which YAML includes; emoji stay one character."""
    return json.dumps(value, ensure_ascii=False)


def short_name(name: str) -> str:
    """Return the last part of a Hub id or of a local path."""
    return name.rstrip("/").split("/")[-1]
