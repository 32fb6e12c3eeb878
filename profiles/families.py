"""Families of models."""

import re


def layer_number(name: str) -> int | None:
    """The first number in a module path or tensor key: its layer."""
    numbers = re.findall(r"(?:^|\.)(\d+)\.", name)
    return int(numbers[0]) if numbers else None
