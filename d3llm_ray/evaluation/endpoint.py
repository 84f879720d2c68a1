"""Rows measured through a served endpoint of ours: the same problems, decoders and judges, by HTTP.

What an answer tells is taken as it is (text, tokens, forwards); what it does not tell is None. Token for token the rows
are those of the engine behind the URL.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2

from d3llm_ray.clients.batch import ask_all
from d3llm_ray.clients.batch_input import BatchRequest
from d3llm_ray.clients.connection import ANSWERS_WITHIN_S, Server, check_server, connected
from d3llm_ray.clients.settings import ClientSettings
from d3llm_ray.config import build
from d3llm_ray.decoding import PRESETS, Decoder, decoding_settings
from d3llm_ray.errors import InputError, one_line, require, unknown
from d3llm_ray.evaluation.evaluate import GivenAnswer, judged
from d3llm_ray.evaluation.rows import EvaluationRow, summarise
from d3llm_ray.evaluation.settings import EvaluateSettings
from d3llm_ray.progress import Progress
from d3llm_ray.serving.schemas import CHAT, COMPLETIONS, MAX_STOP_LENGTH, MAX_STOPS
from d3llm_ray.tasks import Problem, Task

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
HOTTEST = 2.0  # temperature that a request may have
LOCAL = ("dtype", "device", "max_batch_size", "actors", "cpus_per_actor", "gpus_per_actor", "resource_timeout_s")
OWN_FAULTS = (408, 413)  # statuses that one request has earned by itself, as it has a 500
PROMPTS = ("messages", "prompt", "body")  # where the same is true of a 400
BLOCK = "block_size"  # a decoder's None stands for the family's, of which a card has the number

_Asked = tuple[str, dict[str, Any]]  # route and body
_Told = dict[str, Any] | str  # the answer's body, or why there is none


@contextmanager
def endpoint(settings: EvaluateSettings, progress: Progress) -> Iterator[EndpointRows]:
    """The server behind `url` while the block runs.

    Raises:
        InputError: settings that do not go with `url`, a server that wants another key, or one that is none of ours.
        WorkError: nothing answers.
    """
    for name in LOCAL:
        value, usual = getattr(settings, name), type(settings).model_fields[name].get_default()
        require(value == usual, name, value, "nothing beside url, whose server has settings of its own")
    require(settings.temperature <= HOTTEST, "temperature", settings.temperature, f"at most {HOTTEST:g} with url")
    client = build(ClientSettings, {"url": settings.url, "api_key_file": settings.api_key_file})
    check_server(client)
    with connected(client, settings.concurrency) as server:
        with httpx2.Client(timeout=ANSWERS_WITHIN_S, **server.http_options) as http:
            cards = {card["id"]: card for card in http.get(f"{server.url}/v1/models").json()["data"]}
            version = http.get(f"{server.url}/version")
        ours = version.status_code == 200 and all("settings_by_decoder" in card for card in cards.values())
        require(ours, "url", server.url, "a server of d3llm-ray, as other APIs tell nothing of forwards")
        yield EndpointRows(settings, server, cards, str(version.json()["version"]), progress)


def overrides(card: dict[str, Any], chosen: Decoder) -> dict[str, Any]:
    """The settings of a decoder that differ from what the server decodes with when it is named.

    `InputError` for one that is null here and set there: a request has no way to say so.
    """
    usual = card["settings_by_decoder"][chosen.name]
    wanted = dict(chosen.settings())
    if wanted.get(BLOCK, 0) is None:
        wanted[BLOCK] = _family_block(card) or usual[BLOCK]
    differing = {name: value for name, value in wanted.items() if usual[name] != value}
    for name, value in differing.items():
        accepted = f"{usual[name]!r}, what the server has set, or another number"
        require(value is not None, f"{chosen.name}: {name}", value, accepted)
    return differing


def _family_block(card: dict[str, Any]) -> int | None:
    """The block size of the model's family, as a preset shows it that has none of its own."""
    shown = (name for name in card["decoders"] if name in PRESETS and PRESETS[name].block_size is None)
    return next((card["settings_by_decoder"][name]["block_size"] for name in shown if name != card["decoder"]), None)


class EndpointRows:
    """Measures rows at one server with one set of settings. `cards`: what it lists of each model, by its id."""

    def __init__(
        self,
        settings: EvaluateSettings,
        server: Server,
        cards: dict[str, dict[str, Any]],
        version: str,
        progress: Progress,
    ) -> None:
        self._settings, self._server, self._cards = settings, server, cards
        self._version, self._progress = version, progress

    def content(self, model: str) -> list[Any]:
        """What an answer depends on, as far as the server tells."""
        told = {name: value for name, value in self._cards[model].items() if name != "created"}
        return [self._server.url, self._version, told]

    def check(self, model: str, chosen: Decoder, task: Task) -> None:
        """`InputError` for a model, decoder, length or stop strings that the server would refuse."""
        if model not in self._cards:
            raise unknown("models", model, self._cards)
        card, url = self._cards[model], self._server.url
        if chosen.name not in card["decoders"]:
            raise unknown("decoders", chosen.name, card["decoders"])
        accepted = card["settings_by_decoder"][chosen.name]
        for name, value in chosen.settings().items():
            require(name in accepted, name, value, f"none, as the version of {url} does not have it")
        overrides(card, chosen)
        length, limit = self._settings.max_tokens, card["max_tokens_limit"]
        require(length <= limit, "max_tokens", length, f"at most {limit} at {url}")
        fit = len(task.stop) <= MAX_STOPS and all(len(text) <= MAX_STOP_LENGTH for text in task.stop)
        stops = f"with url at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters"
        require(fit, f"tasks: {task.name}: stop", task.stop, stops)

    def first_prompt(self, model: str, problem: Problem) -> str:
        """A problem's prompt as the model behind the URL reads it; why it cannot be read where that is so."""
        (ids,) = self._prompt_ids(model, [problem])
        if isinstance(ids, str):
            return f"(refused: {ids})"
        (answer,) = self._ask([(DETOKENIZE, {"model": model, "tokens": ids})])
        return answer if isinstance(answer, str) else str(answer["prompt"])

    def row(self, model: str, chosen: Decoder, task: Task, problems: Sequence[Problem]) -> EvaluationRow:
        """One row, its `model` the server's id. `seconds` begin when all prompts are ready and `warmup` is over."""
        settings = self._settings
        asked = self._requests(model, chosen, task, problems)
        sent = [one for one in asked if not isinstance(one, str)]
        warmup = min(settings.warmup, len(problems))
        self._ask(sent[:warmup])
        with self._progress.stage(f"evaluate {chosen.name}", len(sent), "problem"):
            began = time.perf_counter()
            found = iter(self._ask(sent, self._progress))
            seconds = time.perf_counter() - began
        told = [one if isinstance(one, str) else next(found) for one in asked]
        return summarise(
            judged(task, problems, [_given(*pair) for pair in zip(problems, told, strict=True)]),
            seconds,
            model=model,
            decoder=chosen.name,
            task=task.name,
            settings=decoding_settings(chosen),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            top_p=settings.top_p,
            warmup=warmup,
            max_batch_size=None,
            endpoint=self._server.url,
            concurrency=settings.concurrency,
        )

    def _requests(self, model: str, chosen: Decoder, task: Task, problems: Sequence[Problem]) -> list[_Asked | str]:
        """What is sent for each problem, or why its prompt is refused."""
        settings = self._settings
        common: dict[str, Any] = {
            "model": model,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": settings.seed,
            "diffusion": {"decoder": chosen.name, **overrides(self._cards[model], chosen)},
            "stop": list(task.stop),
        }
        # A chat cannot be asked to go on with an answer that has begun, but a completion takes a chat's token ids.
        begun = [problem for problem in problems if problem.text is None and problem.prefix]
        ids = iter(self._prompt_ids(model, begun))
        asked: list[_Asked | str] = []
        for problem in problems:
            if problem.text is None and not problem.prefix:
                asked.append((CHAT, {**common, "messages": problem.messages}))
                continue
            prompt = next(ids) if problem.text is None else problem.text + problem.prefix
            refused = problem.text is None and isinstance(prompt, str)
            completion = {**common, "prompt": prompt, "return_token_ids": True}
            asked.append(str(prompt) if refused else (COMPLETIONS, completion))
        return asked

    def _prompt_ids(self, model: str, problems: Sequence[Problem]) -> list[list[int] | str]:
        """Token ids of whole prompts, or why they are refused."""
        parts = [_parts(problem) for problem in problems]
        asked = [(TOKENIZE, {"model": model, **part}) for of_one in parts for part in of_one]
        found = iter(self._ask(asked))
        prompts: list[list[int] | str] = []
        for of_one in parts:
            told = [next(found) for _ in of_one]
            refused = [one for one in told if isinstance(one, str)]
            ids = [token for one in told if not isinstance(one, str) for token in one["tokens"]]
            prompts.append(refused[0] if refused else ids)
        return prompts

    def _ask(self, asked: Sequence[_Asked], progress: Progress | None = None) -> list[_Told]:
        """What is answered to each, in their order."""
        lines: dict[int, _Told] = {}

        def keep(request: BatchRequest, line: dict[str, Any]) -> None:
            lines[request.index] = _told(self._server.url, line)
            if progress is not None:
                progress.update(len(lines))

        requests = [BatchRequest(index, index + 1, str(index), *one) for index, one in enumerate(asked)]
        if requests:
            concurrency = min(self._settings.concurrency, len(requests))
            asyncio.run(ask_all(self._settings, self._server, concurrency, iter(requests), keep))
        return [lines[index] for index in range(len(requests))]


def _parts(problem: Problem) -> list[dict[str, Any]]:
    """What is tokenised of a prompt, each by itself, as the engine does it."""
    if problem.text is not None:
        return [{"prompt": problem.text + problem.prefix}]
    return [{"messages": problem.messages}, *([{"prompt": problem.prefix}] if problem.prefix else [])]


def _told(url: str, line: dict[str, Any]) -> _Told:
    """The body of an answer, or why this request has none; `InputError` where all others would be refused as well."""
    if line["error"] is not None:
        return f"{line['error']['code']}: {line['error']['message']}"
    status, body = line["response"]["status_code"], line["response"]["body"]
    if status < 400:
        return dict(body)
    error = body.get("error")
    error = error if isinstance(error, dict) else {"message": error}
    reason = one_line(error.get("message"))
    if status in OWN_FAULTS or status >= 500 or str(error.get("param")).startswith(PROMPTS):
        return reason
    raise InputError(f"{'api_key_file' if status in (401, 403) else 'url'}: {url} refuses what is asked: {reason}")


def _given(problem: Problem, told: _Told) -> GivenAnswer:
    if isinstance(told, str):
        return GivenAnswer("", 0, 0, 0, "error", error=told)
    choice, usage = told["choices"][0], told["usage"]
    ids = choice.get("token_ids")
    return GivenAnswer(
        text=choice["text"] if "text" in choice else choice["message"]["content"],
        tokens=usage["completion_tokens"],
        forwards=usage["forwards"],
        prompt_tokens=usage["prompt_tokens"],
        finish_reason=choice["finish_reason"],
        token_ids=None if ids is None else tuple(ids),
        prompt=None if problem.text is None else problem.text + problem.prefix,
    )
