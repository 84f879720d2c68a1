"""Every field of a request and every setting, set to a value of its own, arrives where it acts. No Ray, no forward."""

from __future__ import annotations

import asyncio
import contextlib
import json
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Metric

from d3llm_ray import config
from d3llm_ray.decoding import DiffusionLLM, Request, decoder
from d3llm_ray.decoding.memory import PositionPool
from d3llm_ray.decoding.presets import PRESETS
from d3llm_ray.errors import InputError
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.models import Family
from d3llm_ray.serving import adapters, app, server, service
from d3llm_ray.serving.bounds import check_overrides
from d3llm_ray.serving.http import create_app
from d3llm_ray.serving.schemas import CHAT, ChatRequest
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings, ServeSettings
from d3llm_ray.serving.worker import EngineWorker, Overloaded, Submission
from tests.serving.keys import key_file
from tests.serving.life import refused_unread

QUESTION = [{"role": "user", "content": "2 + 3 ?"}]


@pytest.fixture
def asked(service: ChatService, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that came to the engine, each answered with the same five tokens in three forwards."""
    requests: list[Request] = []

    def submit(request: Request, deadline: Any, urgent: bool) -> Submission:
        requests.append(request)
        submission = Submission(request, service.worker)
        ids = service.llm.encode("3 + 4")[-8:][:5]
        end = types.SimpleNamespace(finish_reason="length")
        submission.events.put(types.SimpleNamespace(error=None, reveal=None, token_ids=ids, completion=end, forwards=3))  # type: ignore[arg-type]
        return submission

    monkeypatch.setattr(service.worker, "submit", submit)
    return requests


# Fields of a request to a value of their own and to what the engine must be asked then.
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_tokens": (17, {"max_tokens": 17}),
    "max_completion_tokens": (19, {"max_tokens": 19}),
    "temperature": (0.375, {"temperature": 0.375}),
    "top_p": (0.625, {"top_p": 0.625}),
    "top_k": (7, {"top_k": 7}),
    "seed": (2**62, {"seed": 2**62}),
    "stop_token_ids": ([11, 13], {"stop_token_ids": [11, 13]}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "user": ("somebody", {}),
}
# What does not end in the engine's request; where it acts is tested by the test named.
ELSEWHERE = {
    "model": "test_http_app.test_unknown_model_route_and_method",
    "messages": "test_messages_arrive_in_their_order_with_their_roles",
    "stop": "test_http_app.test_stop_string_ends_the_answer_and_frees_the_slot",
    "stream": "test_http_app.test_stream_adds_up_to_the_json_answer",
    "stream_options": "test_http_app.test_stream_adds_up_to_the_json_answer",
    "diffusion": "test_settings_under_diffusion_arrive",
    "n": "test_choices.test_each_choice_is_the_offline_answer_with_its_seed",
    "logprobs": "test_logprobs.test_chat_tells_what_the_engine_reveals",
    "top_logprobs": "test_logprobs.test_chat_tells_what_the_engine_reveals",
}
USUAL = {"max_tokens": 32, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop_token_ids": (), "ignore_eos": False}


def test_no_field_is_forgotten() -> None:
    assert set(FIELDS) | set(ELSEWHERE) == set(ChatRequest.model_fields)
    assert {name for _, expected in FIELDS.values() for name in expected} == set(USUAL) | {"seed"}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_arrive_in_the_engines_request(client: TestClient, asked: list[Request], field: str) -> None:
    value, expected = FIELDS[field]
    response = client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION, field: value})
    assert response.status_code == 200
    (request,) = asked
    for name, usual in USUAL.items():
        assert getattr(request, name) == expected.get(name, usual)
    assert request.seed == expected.get("seed", request.seed)
    assert request.decoder is None
    assert response.json()["usage"]["completion_tokens"] == 5
    assert response.json()["usage"]["forwards"] == 3


def test_all_fields_at_once(client: TestClient, asked: list[Request], service: ChatService) -> None:
    fields = {field: value for field, (value, _) in FIELDS.items() if field != "max_completion_tokens"}
    client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION, **fields})
    (request,) = asked
    expected = {name: value for field in fields for name, value in FIELDS[field][1].items()}
    assert {name: getattr(request, name) for name in expected} == expected
    assert list(request.prompt_ids) == service.llm.encode(QUESTION)


def test_messages_arrive_in_their_order_with_their_roles(
    client: TestClient, asked: list[Request], service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    monkeypatch.setattr(service.llm.tokenizer, "chat_template", template)
    messages = [
        {"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), "123", strict=True)
    ]
    assert client.post(CHAT, json={"model": "tiny-random", "messages": messages}).status_code == 200
    (request,) = asked
    tokenizer = service.llm.tokenizer
    assert tokenizer is not None
    text = "system 1 user 2 assistant 3 "
    assert list(request.prompt_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("fields", "urgent"),
    [
        ({}, False),
        ({"stream": True}, False),
        ({"stop": "####"}, True),
        ({"logprobs": True}, True),
        ({"stream": True, "diffusion": {"events": True}}, True),
    ],
)
def test_what_may_end_the_decoding_and_what_is_to_be_seen_is_urgent(
    client: TestClient, service: ChatService, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], urgent: bool
) -> None:
    told, submit = [], service.worker.submit
    monkeypatch.setattr(service.worker, "submit", lambda *asked: told.append(asked[2]) or submit(*asked))
    assert client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION, **fields}).status_code == 200
    assert told == [urgent]


def own_value(value: Any) -> Any:
    """Another value of a decoder's setting, one that a request may ask for."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value < 100 else value // 2
    return value / 2 if isinstance(value, float) and value else 0.5


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - {"fast-dllm-v2", "autoregressive"}))
def test_settings_under_diffusion_arrive(
    client: TestClient, asked: list[Request], service: ChatService, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(service, "decoder", decoder(name, block_size=16))
    usual = decoder(name, block_size=16).settings()
    numbers = {key: own_value(value) for key, value in usual.items() if isinstance(value, bool | int | float)}
    assert numbers
    for key, value in numbers.items():
        overrides = {key: value}
        response = client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION, "diffusion": overrides})
        assert response.status_code == 200, (key, value, response.json())
        chosen = asked.pop().decoder
        assert chosen is not None
        assert chosen.settings() == usual | overrides


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_number_under_diffusion_is_bounded(service: ChatService, name: str) -> None:
    """docs/serving.md: lengths up to the longest answer in whole blocks, everything else up to 10,000."""
    family: Family = service.llm.family  # blocks of 16
    usual = decoder(name)
    in_tokens = {"block_size", "sub_block_size", "steps", "cache_delay"}
    for key, value in usual.settings().items():
        if isinstance(value, str | bool) or key == "rule":
            continue
        block = usual.block_length(family, 8)
        bound = -(-100 // block) * block if key in in_tokens else 10_000
        check_overrides({key: bound}, usual, family, 8, 100)
        for beyond in (bound + 1, 10**30, 1e300):
            with pytest.raises(InputError, match=f"^{key}: got .*accepted: .*{bound}"):
                check_overrides({key: beyond}, usual, family, 8, 100)


# Settings


def test_settings_of_a_replica_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loaded: dict[str, Any] = {}
    worker: dict[str, Any] = {}

    def from_pretrained(*args: Any) -> Any:
        names = ("name_or_path", "decoder", "dtype", "device", "max_batch_size")
        loaded.update(zip(names, args, strict=True))
        return types.SimpleNamespace(
            engine=types.SimpleNamespace(context=512, decoder=args[1], runner=None),
            family=types.SimpleNamespace(eos_token_id=1),
            generate=lambda *_, **__: [],
        )

    def make_worker(engine: Any, capacity: int, metrics: Any, step_timeout_s: float) -> None:
        worker.update(capacity=capacity, step_timeout_s=step_timeout_s)

    monkeypatch.setattr(DiffusionLLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(service, "EngineWorker", make_worker)
    monkeypatch.setattr(service, "with_adapters", lambda llm, folders: loaded.update(folders) or llm)
    monkeypatch.setattr(adapters, "check_adapters", lambda *_: None)
    values = {
        "model": "tiny-llada",
        "served_model_name": "mine",
        "decoder": "dparallel",
        "decoder_settings": {"entropy_threshold": 0.125},
        "dtype": "bfloat16",
        "device": "cuda:1",
        "cpus_per_actor": 3,
        "gpus_per_actor": 0.25,
        "max_batch_size": 5,
        "max_queue": 7,
        "max_tokens": 48,
        "max_tokens_limit": 96,
        "max_body_bytes": 2_000,
        "step_timeout_s": 33.0,
        "request_decoders": ["vanilla", "d2f"],
        "adapters": {"tuned": "/adapters/tuned"},
        "api_keys": key_file(tmp_path, "key-1"),
        "api_keys_required": True,
        "cors_origins": ["https://chat.example.com"],
        "log_requests": False,
        "request_timeout_s": 5.0,  # where it acts: test_deadlines
        "slow_reader_timeout_s": 6.0,  # test_slow_readers
        "drain_timeout_s": 7.0,
    }
    assert set(values) == set(ReplicaSettings.model_fields)
    settings = config.build(ReplicaSettings, values)
    made = ChatService(settings)
    expected = {"name_or_path": "tiny-llada", "dtype": "bfloat16", "device": "cuda:1", "max_batch_size": 5}
    expected |= {"tuned": "/adapters/tuned"}
    chosen = loaded.pop("decoder")
    assert loaded == expected
    assert (chosen.name, chosen.settings()["entropy_threshold"]) == ("dparallel", 0.125)
    assert worker == {"capacity": 5 + 7, "step_timeout_s": 33.0}
    assert made.settings.model_id == "mine"
    assert made.keys.asks and made.keys.holds(b"key-1") and not made.keys.holds(b"key-2")
    assert list(made.decoders) == ["dparallel", "vanilla", "d2f"]
    assert made.decoders["dparallel"] is chosen
    asked = ChatRequest(model="mine", messages=[{"role": "user", "content": "a"}])  # type: ignore[list-item]
    assert made._max_tokens(asked, "messages", 10) == 48
    with pytest.raises(Exception, match="max_tokens: got 97; accepted: 1 to 96"):
        made._check_answer_length(ChatRequest(model="m", messages=QUESTION, max_tokens=97))  # type: ignore[arg-type]
    options = app.application(settings, num_replicas=6)._bound_deployment
    assert options.ray_actor_options["num_cpus"] == 3
    assert options.ray_actor_options["num_gpus"] == 0.25
    assert options.num_replicas == 6
    # Serve itself never refuses or keeps anything waiting, a health check least of all.
    assert options._deployment_config.max_queued_requests == -1
    assert options._deployment_config.max_ongoing_requests > 1000
    assert options._deployment_config.graceful_shutdown_timeout_s == 7.0


def test_settings_of_the_verb_arrive(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    told: dict[str, Any] = {}
    stub = types.SimpleNamespace(
        status=lambda: types.SimpleNamespace(proxies={}, applications={}),
        delete=lambda name, **_: told.update(deleted=name),
        start=lambda **options: told.update(options),
        run=lambda application, **options: told.update(options, application=application),
        shutdown=lambda: told.update(ended=told["deleted"]),  # answers are finished before
    )
    monkeypatch.setattr(server, "serve", stub)
    monkeypatch.setattr(server, "_wait_healthy", lambda url: told.update(url=url))
    monkeypatch.setattr(server.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(server, "connect", lambda: None)
    values = {"model": str(tiny_checkpoint), "max_queue": 3, "max_batch_size": 2}
    settings = ServeSettings(host="localhost", port=0, replicas=3, **values)
    assert set(ServeSettings.model_fields) - set(ReplicaSettings.model_fields) == {
        "host",
        "models",
        "port",
        "replicas",
    }
    with server.serve_in_background(settings) as url:
        port = told["http_options"]["port"]
        assert told["http_options"]["host"] == "localhost"
        assert url == told["url"] == f"http://localhost:{port}"
        assert "front:middlewares" in str(told["controller_options"])
        bound = told["application"]._bound_deployment
        assert bound.num_replicas == 3
        assert bound.init_args == (ReplicaSettings(**values),)
    assert told["ended"] == server.APPLICATION


@pytest.mark.parametrize(("port", "lost", "starts"), [(0, 0, 1), (0, 2, 3), (0, 3, 3), (8123, 1, 1)])
def test_a_port_that_is_lost_meanwhile_is_drawn_again_where_any_will_do(
    monkeypatch: pytest.MonkeyPatch, port: int, lost: int, starts: int
) -> None:
    tried: list[int] = []

    def start(http_options: dict[str, Any], **_: Any) -> None:
        tried.append(http_options["port"])
        if len(tried) <= lost:
            raise RuntimeError(f"Failed to bind to address '127.0.0.1:{tried[-1]}'.")

    monkeypatch.setattr(server, "serve", types.SimpleNamespace(start=start, shutdown=lambda: None))
    monkeypatch.setattr(server, "_free_port", lambda settings: settings.port or 9000 + len(tried))
    with contextlib.nullcontext() if lost < starts else pytest.raises(RuntimeError, match="Failed to bind"):
        assert server._started(ServeSettings(port=port)) == tried[-1]
    assert len(tried) == len(set(tried)) == starts


def post_in_chunks(served: ChatService, body: bytes, size: int) -> tuple[int, bytes]:
    """Status and body of a chat request that arrives `size` bytes at a time."""
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False
    arriving, sent = iter(messages), []

    async def receive() -> Any:
        return next(arriving, None) or await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")]}
    asyncio.run(create_app(served)(scope, receive, send))
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize("size", [10, 10_000])
def test_the_body_limit_is_of_the_whole_body_however_it_is_cut(
    service: ChatService, asked: list[Request], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    body = json.dumps({"model": "tiny-random", "messages": QUESTION, "max_tokens": 1}).encode()
    for limit, status in ((len(body), 200), (len(body) - 1, 413)):
        monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"max_body_bytes": limit}))
        answered, answer = post_in_chunks(service, body, size)
        assert answered == status
    assert json.loads(answer)["error"]["message"] == f"body: too large; accepted: at most {limit} bytes"


@pytest.mark.parametrize("failed", [False, True])
def test_check_health_raises_what_the_worker_complains_of(failed: bool) -> None:
    """Serve's controller replaces a replica whose check raises."""
    worker = types.SimpleNamespace(problem=lambda: "the engine has failed" if failed else None)
    replica: Any = types.SimpleNamespace(_service=types.SimpleNamespace(worker=worker))
    with pytest.raises(RuntimeError, match="the engine has failed") if failed else nullcontext():
        asyncio.run(app.DecoderReplica.check_health(replica))


def test_metrics_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: dict[tuple[str, ...], float] = {}

    def record(metric: Metric, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(metric.info["tag_keys"])
        key = (metric.info["name"], *(tags[name] for name in metric.info["tag_keys"]))
        recorded[key] = value + (recorded.get(key, 0) if isinstance(metric, RayCounter) else 0)

    monkeypatch.setattr(Metric, "_record", record)
    metrics = ServingMetrics("m")
    pool = PositionPool(100)
    assert pool.take(40) == 0
    metrics.accepted()
    metrics.refused()
    metrics.stepped(active=3, waiting=4, pool=pool)
    metrics.computed(full=2, cached=0)
    metrics.computed(full=0, cached=5)
    metrics.first_text(0.25)
    metrics.finished("stop", prompt_tokens=30, completion_tokens=12, forwards=4, seconds=0.5)
    metrics.finished("length", prompt_tokens=5, completion_tokens=0, forwards=0, seconds=1.5)
    metrics.aborted()
    metrics.timed_out()
    metrics.failed()
    assert recorded == {
        ("d3llm_requests", "m"): 1,
        ("d3llm_refused", "m"): 1,
        ("d3llm_finished", "m", "stop"): 1,
        ("d3llm_finished", "m", "length"): 1,
        ("d3llm_finished", "m", "abort"): 1,
        ("d3llm_finished", "m", "timeout"): 1,
        ("d3llm_finished", "m", "error"): 1,
        ("d3llm_tokens", "m", "prompt"): 35,
        ("d3llm_tokens", "m", "completion"): 12,
        ("d3llm_forwards", "m"): 1,
        ("d3llm_request_forwards", "m", "full"): 2,
        ("d3llm_request_forwards", "m", "cached"): 5,
        ("d3llm_active", "m"): 3,
        ("d3llm_queue", "m"): 4,
        ("d3llm_kv_used", "m"): 40,
        ("d3llm_kv_positions", "m"): 100,
        ("d3llm_ttfb_seconds", "m"): 0.25,
        ("d3llm_request_seconds", "m"): 1.5,
        ("d3llm_tokens_per_second", "m"): 24.0,
        ("d3llm_tpf", "m"): 3.0,
    }


def test_an_answers_tokens_are_counted_by_kind(
    client: TestClient, asked: list[Request], service: ChatService, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[tuple[Any, ...]] = []
    monkeypatch.setattr(service._metrics, "finished", lambda *values: finished.append(values))
    usage = client.post(CHAT, json={"model": "tiny-random", "messages": QUESTION}).json()["usage"]
    prompt = len(service.llm.encode(QUESTION))
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, 5)
    assert [values[:4] for values in finished] == [("length", prompt, 5, 3)]
    assert 0 < finished[0][4] < 10


def test_refused_before_the_body_is_read(service: ChatService, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is full reads no body, whatever is in it; other routes go on."""
    monkeypatch.setattr(service.worker, "_capacity", 0)
    start = refused_unread(create_app(service))
    assert start["status"] == 429
    assert (b"retry-after", b"1") in start["headers"]
    with TestClient(create_app(service)) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_worker_counts_what_it_accepts_and_refuses() -> None:
    counted: list[str] = []
    metrics: Any = types.SimpleNamespace(
        accepted=lambda: counted.append("accepted"), refused=lambda: counted.append("refused")
    )
    worker = EngineWorker(types.SimpleNamespace(), 1, metrics, 1.0)  # type: ignore[arg-type]

    async def main() -> None:
        worker.submit(Request([1]))
        with pytest.raises(Overloaded):
            worker.submit(Request([1]))

    asyncio.run(main())
    assert counted == ["accepted", "refused"]
