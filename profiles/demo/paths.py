"""Where the embedded demo model and its prompts lie, in a checkout and in an installed wheel alike.

Both are ordinary package data beside this file: a Hugging Face checkpoint folder, and JSON lines
with one object {"id", "domain", "text"} per request. `demo` as MODEL or SOURCE of a command means
these two paths.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """The folder of the demo checkpoint: config, weights, tokenizer, model card, training facts."""
    return _HERE / "model"


def demo_prompts_path() -> Path:
    """The JSON-lines file of the demo prompts."""
    return _HERE / "prompts.jsonl"
