"""A card's metadata: reading it, and a part of the checks that the Hub makes of it."""

import json
import re
from pathlib import Path

import yaml

ACCEPTED = yaml.safe_load(Path(__file__).with_name("card_values.yaml").read_text())


def read_metadata(card: str) -> dict:
    """Return a card's YAML header as JSON values (dates become text, NaN null), or ValueError."""
    header = re.match(r"---\r?\n(.*?)\n---", card, re.DOTALL)
    try:
        text = json.dumps(yaml.safe_load(header[1]) if header else {}, default=str, skipkeys=True)
        return dict(json.loads(text, parse_constant=lambda name: None) or {})
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(f"The metadata is no YAML mapping: {error}") from error


def find_errors(card: str) -> list[str]:
    """Return what the Hub would refuse in a card's metadata."""
    try:
        metadata = read_metadata(card)
        for model in metadata.get("model-index") or []:
            for result in model["name"] and model["results"]:
                result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]
                [(metric["type"], metric["value"]) for metric in result["metrics"]]
    except (ValueError, TypeError, KeyError) as error:
        return [f"The metadata is malformed: {error!r}"]
    errors = []
    for key, accepted in ACCEPTED.items():
        value = metadata.get(key) or "other"
        if any(item not in accepted for item in (value if isinstance(value, list) else [value])):
            errors.append(f'"{key}" must be one of [{", ".join(accepted)}]')
    return errors
