"""Decide which server gets the API key."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from synth.config import Model
from synth.engines.interface import EngineError


def api_key(model: Model, url: str) -> str:
    """Return the API key; a server in the local network needs none.

    Raises EngineError where another one has none, or would get it in plain text.
    """
    found, address = os.environ.get(model.api_key_env, "").strip(), urlsplit(url)
    if is_local(address.hostname or ""):
        return found or "none"
    if not found:
        raise EngineError(f"{model.path}: expected an API key for {url} in the environment variable {model.api_key_env}, got none; "
                          "export it")
    if address.scheme != "https" and not model.key_over_http:
        raise EngineError(f"{model.path}: expected https, to send the key in {model.api_key_env} outside the local network, got {url}; "
                          "correct base_url, or set key_over_http: true")
    return found


def is_local(host: str) -> bool:
    """Return whether a host is in the local network."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith((".local", ".internal")) or "." not in host
    return address.is_private or address.is_loopback
