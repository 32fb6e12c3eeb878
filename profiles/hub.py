"""Which names can be models of the Hugging Face hub, and whether the hub answers at all.

Without a network, the hub's client tries for half a minute before it looks into its cache. Here one
name look-up decides.
"""

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

ENDPOINT = "https://huggingface.co"


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id, "name" or "namespace/name", and not that of a
    path."""
    parts = name.split("/")
    return len(parts) <= 2 and not name.endswith(".json") and all(p and p[0] not in ".~" for p in parts)


def hub_in_reach() -> bool:
    """False where the hub's host name cannot be found, so that only its cache is left. Behind a
    proxy the answer is always True."""
    if getproxies():
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
