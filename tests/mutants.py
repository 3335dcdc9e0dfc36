"""Random damage: of bytes, and of JSON-like data in places that a reader looks at."""

from __future__ import annotations

import copy
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "", "a", "../../x", "/etc/passwd",
    "\ud800", "\0", "ü" * 3000, [], {}, [None], {"a": 1}, [[[[]]]], list(range(2000)),
)  # fmt: skip
"""What may stand where something else was meant."""


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to three of: bits turned over, bytes overwritten, a piece cut out, doubled, put in, zeroed; the end cut off."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice((1, 4, 64, 4096)))
        match chance.randrange(7):
            case 0:
                for _ in range(chance.randint(1, 8)):
                    if data:
                        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                data[at:end] = chance.randbytes(end - at)
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end]
            case 4:
                data[at:at] = chance.randbytes(chance.choice((1, 4, 64, 4096)))
            case 5:
                data[at:end] = bytes(end - at)
            case 6:
                del data[at:]
    return bytes(data)


def damaged_data(data: Any, chance: random.Random) -> Any:
    """A copy with one to three places of nested dicts and lists replaced, removed, renamed or added to."""
    holder = [copy.deepcopy(data)]
    for _ in range(chance.randint(1, 3)):
        parent: Any = holder
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = chance.choice(keys)
            below = parent[key]
            if not isinstance(below, (dict, list)) or not below or chance.random() < 0.3:
                break
            parent = below
        odd = copy.deepcopy(chance.choice(ODD))
        match chance.randrange(4):
            case 1 if parent is not holder:
                del parent[key]
            case 2 if isinstance(parent, dict):
                parent[str(odd)[:50]] = parent.pop(key)
            case 3 if isinstance(below, list):
                below.append(odd)
            case _:
                parent[key] = odd
    return holder[0]
