"""The verb `batch`: answer a file of requests in OpenAI's batch format, through a server or the model itself.

Output format: https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx2

from d3llm_ray.clients.batch_input import BatchRequest, check_input, read_requests
from d3llm_ray.clients.batch_output import BatchOutput, Finished
from d3llm_ray.clients.connection import Server, check_server, connected
from d3llm_ray.clients.settings import BatchSettings, RequestOptions
from d3llm_ray.errors import IncompleteError, WorkError, first_failures, one_line, require
from d3llm_ray.output_folder import sole_writer
from d3llm_ray.progress import Progress
from d3llm_ray.report import check_output

CONNECT_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
NO_ROOM = {429, 503}  # it is the server's state, not the request, that is answered with these
PASSING = {500, 502, 504, *NO_ROOM}
OWN_FAULT = "decoding_failed"  # the code of an answer of 500 that would be the same the next time
KEPT = "what is finished is kept, and the same command goes on from there"


@sole_writer
def run(settings: BatchSettings, progress: Progress | None = None) -> str:
    """Answer every request of `input` and return the path of `output`.

    The lines are in the order of the requests, whatever order they were answered in: `id`, `custom_id`, and either
    `response` (status code, request id and body; also of a request that the server refused) or `error` (no answer that
    could be read). An interrupted run goes on from what it has answered; a finished one is not repeated.

    Raises:
        InputError: bad settings or a line that is no request, before anything is asked; an output of something else.
        WorkError: the server cannot be reached, or has no room for long.
        IncompleteError: some requests have no answer; the file with all the others is written.
    """
    real = check_output(settings.output, "output")
    check_server(settings)
    require(real != settings.input.resolve(), "output", str(settings.output), "another file than input")
    progress = progress or Progress()
    output = BatchOutput(settings.output, check_input(settings.input), _what_answers_depend_on(settings))
    finished = output.finished()
    if finished is None:
        with output.open():
            _answer(settings, output, progress)
            finished = output.finish()
    else:
        output.clear()
        progress.note(f"batch: {settings.output} is finished; nothing was asked")
    return _conclude(settings, finished)


def _what_answers_depend_on(settings: BatchSettings) -> dict[str, Any]:
    return {"url": settings.url} if settings.url is not None else settings.of_model()


def _answer(settings: BatchSettings, output: BatchOutput, progress: Progress) -> None:
    missing = output.missing
    if missing == 0:
        return
    concurrency = min(settings.concurrency or 2 * settings.max_batch_size, missing)
    with connected(settings, concurrency) as server, progress.stage("batch", missing, "request"):
        done = failed = 0

        def keep(request: BatchRequest, line: dict[str, Any]) -> None:
            nonlocal done, failed
            failure = _failure(request, line)
            output.add(request.index, line, failure)
            done, failed = done + 1, failed + (failure is not None)
            progress.update(done, failed=failed)

        pending = (request for request in read_requests(settings.input) if not output.has(request.index))
        asyncio.run(ask_all(settings, server, concurrency, pending, keep))


async def ask_all(
    settings: RequestOptions,
    server: Server,
    concurrency: int,
    pending: Iterator[BatchRequest],
    keep: Callable[[BatchRequest, dict[str, Any]], None],
) -> None:
    """Ask every request, `concurrency` at a time, and `keep` the output line of each as it comes.

    Raises:
        WorkError: the server is not there, or has no room for long.
    """
    retries = 0 if server.local else settings.retries  # the engine of this process does not come back
    timeout = httpx2.Timeout(settings.timeout_s, connect=CONNECT_S)
    limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(timeout=timeout, limits=limits, **server.http_options) as client:

        async def work() -> None:
            for request in pending:  # one iterator for all: each takes the next
                keep(request, await _ask(client, server, request, retries))

        tasks = [asyncio.create_task(work()) for _ in range(concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _ask(client: httpx2.AsyncClient, server: Server, request: BatchRequest, retries: int) -> dict[str, Any]:
    """The output line of one request. `WorkError` when the server is not there for any request."""
    name = f"batch_req_{uuid.uuid4().hex}"
    content = json.dumps(request.body).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": name}
    for attempt in range(retries + 1):
        response, reason = None, ""
        try:
            response = await client.post(f"{server.url}{request.route}", content=content, headers=headers)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout):
            return _no_answer(name, request, "timeout", "no answer within timeout_s")
        except httpx2.HTTPError as error:
            reason = f"does not answer: {one_line(error) or type(error).__name__}"
        if response is not None and not _may_pass(response):
            return _line(name, request, response)
        if attempt < retries:
            await asyncio.sleep(_wait_s(response, attempt))
    if response is not None and response.status_code not in NO_ROOM:
        return _line(name, request, response)
    reason = reason or f"answers {response.status_code if response is not None else ''} and takes no request"
    raise WorkError(f"{'model' if server.local else 'url'}: {server.url} {reason}; {KEPT}")


def _may_pass(response: httpx2.Response) -> bool:
    """Whether the same request may be answered later."""
    return response.status_code in PASSING and OWN_FAULT not in response.text


def _wait_s(response: httpx2.Response | None, attempt: int) -> float:
    """Seconds before the next attempt: as the server says, else doubling, so that not all come at once."""
    said = "" if response is None else response.headers.get("Retry-After", "")
    backoff = min(FIRST_WAIT_S * 2.0**attempt, LONGEST_WAIT_S)
    told = min(float(said), LONGEST_WAIT_S) if said.isdecimal() else 0.0
    return max(told, backoff) * random.uniform(1.0, 1.25)


def _line(name: str, request: BatchRequest, response: httpx2.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        said = f"status {response.status_code}: {one_line(response.text)[:200]}"
        return _no_answer(name, request, "invalid_response", said)
    answer = {
        "status_code": response.status_code,
        "request_id": response.headers.get("X-Request-Id", name),
        "body": body,
    }
    return {"id": name, "custom_id": request.custom_id, "response": answer, "error": None}


def _no_answer(name: str, request: BatchRequest, code: str, message: str) -> dict[str, Any]:
    error = {"code": code, "message": message}
    return {"id": name, "custom_id": request.custom_id, "response": None, "error": error}


def _failure(request: BatchRequest, line: dict[str, Any]) -> str | None:
    """Why a line is no answer."""
    response, error = line["response"], line["error"]
    if error is None and response["status_code"] < 400:
        return None
    if error is None:
        error = response["body"].get("error")
    message = error.get("message", error) if isinstance(error, dict) else error
    return f"line {request.line} ({request.custom_id[:60]!r}): {one_line(message)[:300]}"


def _conclude(settings: BatchSettings, finished: Finished) -> str:
    if finished.failed:
        raise IncompleteError(
            f"input: {finished.failed} of {finished.requests} not answered, the others are in {settings.output}: "
            f"{first_failures(finished.failures, finished.failed)}"
        )
    return str(settings.output)
