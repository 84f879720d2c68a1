"""A file of requests in OpenAI's batch format, read line by line: it may be larger than memory.

Format: https://platform.openai.com/docs/api-reference/batch/request-input
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3llm_ray.errors import InputError, first_failures
from d3llm_ray.paths import not_uploaded
from d3llm_ray.serving.schemas import DECODING

FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class BatchRequest:
    """One line. `index` counts requests from 0, `line` lines of the file from 1."""

    index: int
    line: int
    custom_id: str
    route: str
    body: dict[str, Any]


@dataclass(frozen=True)
class InputSummary:
    """What a whole file of requests is known by."""

    requests: int
    sha256: str


def check_input(path: Path) -> InputSummary:
    """Read all of it; `InputError` names the lines that are no requests and the ids that come twice.

    Memory: the ids.
    """
    if not path.is_file():
        kind = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"input: {str(path)!r} {kind}; accepted: a .jsonl file of requests{not_uploaded(path)}")
    faults: list[str] = []
    faulty, requests = 0, 0
    lines_of: dict[str, int] = {}
    sha256 = hashlib.sha256()
    for number, raw in _lines(path):
        sha256.update(raw)
        if not raw.strip():
            continue
        try:
            request = _parse(raw, requests, number)
            first = lines_of.setdefault(request.custom_id, number)
            if first != number:
                raise ValueError(f"custom_id: {request.custom_id!r} is that of line {first} as well")
            requests += 1
        except ValueError as error:
            faulty += 1
            if faulty <= 10:
                faults.append(f"line {number}: {error}")
    if faults:
        raise InputError(f"input: {str(path)!r}: {first_failures(faults, faulty)}")
    if not requests:
        raise InputError(f"input: {str(path)!r} holds no requests; accepted: at least one line")
    return InputSummary(requests, sha256.hexdigest())


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The requests of a file that `check_input` has accepted, one at a time."""
    index = 0
    for number, raw in _lines(path):
        if raw.strip():
            yield _parse(raw, index, number)
            index += 1


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def _parse(raw: bytes, index: int, line: int) -> BatchRequest:
    """`ValueError` says in one line what is wrong."""
    try:
        row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict) or row.keys() != set(FIELDS):
        raise ValueError(f"accepted: an object with {', '.join(FIELDS)} and nothing else")
    custom_id, body = row["custom_id"], row["body"]
    if not isinstance(custom_id, str) or not custom_id:
        raise ValueError(f"custom_id: got {_shown(custom_id)}; accepted: a text that is not empty")
    if row["method"] != "POST":
        raise ValueError(f'method: got {_shown(row["method"])}; accepted: "POST"')
    if row["url"] not in DECODING:
        raise ValueError(f"url: got {_shown(row['url'])}; accepted: {' or '.join(DECODING)}")
    if not isinstance(body, dict):
        raise ValueError(f"body: got {_shown(body)}; accepted: an object")
    if body.get("stream"):
        raise ValueError("body.stream: an answer of a batch is no stream; accepted: false")
    return BatchRequest(index, line, custom_id, row["url"], body)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
