"""Strategies that damage files: bytes flipped, cut and inserted, and JSON values exchanged."""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

MARK, AGAIN = "\x01value", "\x01again"
SECONDS = 3.0  # of processor time, for any file of these sizes: hundred times what they take

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, 2**63, -(2**63), 10**400]),
    st.floats(allow_nan=False),
    st.text(max_size=8),
    st.sampled_from(["../x", "os.system", "\x1b[2J", "a" * 5000, "\ud800"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
TEXTS = st.one_of(
    JSON.map(json.dumps),
    st.sampled_from(["NaN", "-Infinity", "1e999", "-0.0", "9" * 5000, "1.0", "true", '"1"']),
    st.sampled_from([17, 400, 3000, 60_000]).map(lambda depth: "[" * depth + "]" * depth),
    st.sampled_from([17, 900]).map(lambda depth: '{"a":' * depth + "1" + "}" * depth),
    st.sampled_from([300, 9000]).map(lambda length: json.dumps(list(range(length)))),
)


@st.composite
def damaged_bytes(draw: Callable, content: bytes) -> bytes:
    """The content with one to three places flipped, cut, overwritten, doubled or grown."""
    for _ in range(draw(st.integers(1, 3))):
        if not content:
            break
        place = draw(st.integers(0, len(content) - 1))
        end = min(len(content), place + draw(st.integers(1, 40)))
        change = draw(st.sampled_from(["flip", "cut", "drop", "write", "insert", "double"]))
        if change == "flip":
            bit = bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
            content = content[:place] + bit + content[place + 1 :]
        elif change == "cut":
            content = content[:place]
        elif change == "drop":
            content = content[:place] + content[end:]
        elif change == "write":
            new = draw(st.binary(min_size=1, max_size=9))
            content = content[:place] + new + content[place + len(new) :]
        elif change == "insert":
            content = content[:place] + draw(st.binary(min_size=1, max_size=40)) + content[place:]
        else:
            content = content[:end] + content[place:]
    return content


@st.composite
def damaged_json(draw: Callable, values: dict[str, Any], inside: tuple[str, ...] = ()) -> bytes:
    """The JSON with one value at any depth exchanged, taken away, added or given twice.

    Args:
        draw: of hypothesis.
        values: the whole object.
        inside: keys that lead to the part that is changed.
    """
    values = copy.deepcopy(values)
    node: Any = values
    for key in inside:
        node = node[key]
    while True:
        places = list(node) if isinstance(node, dict) else range(len(node))
        place = draw(st.sampled_from(places))
        deeper = isinstance(node[place], dict | list) and len(node[place]) > 0
        if not deeper or draw(st.booleans()):
            break
        node = node[place]
    change = draw(st.sampled_from(["exchange", "exchange", "exchange", "drop", "add", "twice"]))
    text = draw(TEXTS)
    if change == "drop":
        del node[place]
    elif change == "exchange":
        node[place] = MARK
    elif isinstance(node, list):
        node.insert(place, MARK)
    else:
        node[f"{place}{AGAIN}" if change == "twice" else draw(st.text(max_size=5))] = MARK
    raw = json.dumps(values)
    return raw.replace(json.dumps(MARK), text).replace(json.dumps(AGAIN)[1:-1], "").encode()


@contextmanager
def quick() -> Iterator[None]:
    """Fail where the body takes longer than any file of these sizes may."""
    before = time.process_time()
    yield
    assert time.process_time() - before < SECONDS
