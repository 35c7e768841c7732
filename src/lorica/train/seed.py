"""Seeds of single draws: a run has no random state that goes on from step to step."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts, for one draw and no other."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
