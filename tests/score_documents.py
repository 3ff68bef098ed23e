"""What `heretic-kl score` writes, checked against its schema."""

import json
from pathlib import Path

import jsonschema

ROOT = Path(__file__).parents[1]


def as_documented(plain):
    """Check a document against docs/score.schema.json, which knows every key."""
    schema = json.loads((ROOT / "docs" / "score.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(plain)
