"""Whether the Hugging Face hub can be reached, found out at once.

huggingface_hub tries for half a minute before it says so, for every file; a wrong name is to be told within seconds.
"""

import os
import socket
from functools import cache
from urllib.parse import urlsplit

_PATIENCE_S = 3.0
_PROXIES = ("https_proxy", "http_proxy", "all_proxy")


@cache
def use_hub_or_cache() -> None:
    """Where the hub cannot be reached, use what was downloaded before and try nothing else."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


def _reachable(endpoint: str) -> bool:
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return True  # the proxy's business
    address = urlsplit(endpoint)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=_PATIENCE_S).close()
    except OSError:
        return False
    return True
