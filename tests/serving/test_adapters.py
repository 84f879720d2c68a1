"""LoRA adapters as models of their own. The oracle: a checkpoint with the adapter merged into it, decoded offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from d3llm_ray.decoding import DiffusionLLM, Request
from d3llm_ray.distillation.lora import add_lora, save_adapter
from d3llm_ray.distillation.student import merged
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_model, save_model
from d3llm_ray.serving.adapters import AdaptedEngine, AdaptedRequest, Adapters, check_adapters, with_adapters
from d3llm_ray.serving.reconfiguration import UserConfig
from d3llm_ray.serving.schemas import CHAT
from d3llm_ray.serving.service import ChatService
from d3llm_ray.serving.settings import ReplicaSettings

PROMPTS = ["2 + 3 ?", "Tom has 5 apples and buys 7 more. How many now?", "10 - 4 ?"]
# Names as clients write them; ranks and places of the adapters differ.
ADAPTERS: dict[str, dict[str, Any]] = {
    "org/first-v1.5": {"rank": 4, "alpha": 8, "targets": None},
    "second": {"rank": 2, "alpha": 8, "targets": ["q_proj", "down_proj"]},
}


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, tuple[str, Path]]:
    """For each adapter, and None for the base: its peft folder and a checkpoint that it is merged into."""
    root = tmp_path_factory.mktemp("adapters")
    made: dict[str | None, tuple[str, Path]] = {None: ("", tiny_checkpoint)}
    for number, (name, values) in enumerate(ADAPTERS.items()):
        model, family = load_model(tiny_checkpoint, "float32", "cpu")
        wrapped = add_lora(model, dropout=0.1, **values)
        torch.manual_seed(number)
        for key, weight in wrapped.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.3)
        folder, whole = root / f"adapter-{number}", root / f"merged-{number}"
        save_adapter(wrapped, folder)
        save_model(merged(wrapped), family, whole)
        for file in tiny_checkpoint.glob("*token*"):
            shutil.copy(file, whole)
        for file in tiny_checkpoint.glob("*.jinja"):
            shutil.copy(file, whole)
        made[name] = (str(folder), whole)
    return made


@pytest.fixture(scope="module")
def folders(trained: dict[str | None, tuple[str, Path]]) -> dict[str, str]:
    return {name: folder for name, (folder, _) in trained.items() if name is not None}


@pytest.fixture(scope="module")
def expected(trained: dict[str | None, tuple[str, Path]]) -> dict[str | None, list[Any]]:
    """What the offline API answers with each."""
    told = {}
    for name, (_, whole) in trained.items():
        told[name] = DiffusionLLM.from_pretrained(whole, "d3llm").generate(PROMPTS, max_tokens=48)
    texts = [output.text for outputs in told.values() for output in outputs]
    assert len(set(texts)) == len(texts)  # the adapters make a difference
    return told


def test_answers_of_a_mixed_load_are_those_of_merged_checkpoints(
    make_service: Callable[..., ChatService],
    client_of: Any,
    folders: dict[str, str],
    expected: dict[str | None, list[Any]],
) -> None:
    """Four slots for 27 requests, so that adapters wait, join and leave in the midst of the others' answers."""
    service = make_service(adapters=folders, max_batch_size=4, decoder="d3llm")
    asked = [(name, number) for _ in range(3) for number in range(len(PROMPTS)) for name in expected]

    with client_of(service) as client:

        def ask(one: tuple[str | None, int]) -> Any:
            model = one[0] or "tiny-random"
            messages = [{"role": "user", "content": PROMPTS[one[1]]}]
            answer = client.post(CHAT, json={"model": model, "messages": messages, "max_tokens": 48}).json()
            assert answer["model"] == model
            return answer["choices"][0]["message"]["content"], answer["usage"]["forwards"]

        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(ask, asked))
    for (name, number), answer in zip(asked, answers, strict=True):
        assert answer == (expected[name][number].text, expected[name][number].forwards), name


def test_a_forward_is_of_one_adapter_and_they_take_turns(
    tiny_checkpoint: Path, folders: dict[str, str], expected: dict[str | None, list[Any]]
) -> None:
    llm = with_adapters(DiffusionLLM.from_pretrained(tiny_checkpoint, "d3llm", max_batch_size=4), folders)
    engine = llm.engine
    assert isinstance(engine, AdaptedEngine)
    names: list[str | None] = [None, "second", "org/first-v1.5", None, "second"]
    wanted = {}
    for number, name in enumerate(names):
        prompt = llm.encode(PROMPTS[number % 3])
        wanted[engine.submit(AdaptedRequest.of(Request(prompt, max_tokens=48), name))] = (name, number % 3)
    turns, found, most = [], {}, 0
    while len(found) < len(names):
        events = engine.step()
        turns.append(engine._adapters._in_force)
        most = max(most, engine.active)
        for event in events:
            assert wanted[event.request_id][0] == turns[-1]
            if event.completion is not None:
                found[event.request_id] = event.completion
    assert most == 4  # slots of all adapters together
    assert turns[:3] == [None, "org/first-v1.5", "second"] == turns[3:6]
    for request_id, (name, number) in wanted.items():
        assert found[request_id].token_ids == expected[name][number].token_ids
    assert engine.active == engine.waiting == 0 and engine.step() == []


def test_base_weights_are_held_once(tiny_checkpoint: Path, folders: dict[str, str]) -> None:
    model = DiffusionLLM.from_pretrained(tiny_checkpoint).model
    before = sum(weight.numel() for weight in model.parameters())
    pointers = {weight.data_ptr() for weight in model.parameters()}
    Adapters(model, folders)
    added = {key: weight for key, weight in model.named_parameters() if "lora_" in key}
    assert sum(weight.numel() for weight in model.parameters()) - sum(one.numel() for one in added.values()) == before
    assert pointers < {weight.data_ptr() for weight in model.parameters()}
    assert sum(one.numel() for one in added.values()) < before / 2


def test_cancelled_in_any_state(tiny_checkpoint: Path, folders: dict[str, str]) -> None:
    engine = with_adapters(DiffusionLLM.from_pretrained(tiny_checkpoint, max_batch_size=2), folders).engine
    ids = [engine.submit(AdaptedRequest.of(Request([5, 6]), name)) for name in (None, "second", "org/first-v1.5")]
    engine.step()
    for one in ids:
        engine.cancel(one)
        engine.step()
    assert engine.active == engine.waiting == 0
    assert engine.submit(Request([5, 6])) > ids[-1]
    engine.step()
    assert engine.active == 1


def test_an_adapter_is_listed_as_a_model_with_its_base(
    make_service: Callable[..., ChatService], client_of: Any, folders: dict[str, str]
) -> None:
    service = make_service(adapters=folders)
    with client_of(service) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("tiny-random", None),
            ("org/first-v1.5", "tiny-random"),
            ("second", "tiny-random"),
        ]
        assert client.get("/v1/models/org/first-v1.5").json() == cards[1]
        missing = client.post(CHAT, json={"model": "third", "messages": [{"role": "user", "content": "x"}]})
        assert missing.status_code == 404
        assert missing.json()["error"]["message"].endswith("accepted: tiny-random, org/first-v1.5, second")


def test_the_default_adapter_changes_while_it_is_served(
    make_service: Callable[..., ChatService],
    client_of: Any,
    folders: dict[str, str],
    expected: dict[str | None, list[Any]],
) -> None:
    service = make_service(adapters=folders, decoder="d3llm")

    def ask(client: TestClient, model: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 48}
        return str(client.post(CHAT, json=body).json()["choices"][0]["message"]["content"])

    with client_of(service) as client:
        for adapter in ("second", None):
            service.reconfigure(UserConfig(adapter=adapter))
            assert client.get("/v1/models/tiny-random").json()["adapter"] == adapter
            assert ask(client, "tiny-random") == expected[adapter][0].text
            assert ask(client, "org/first-v1.5") == expected["org/first-v1.5"][0].text


def test_without_adapters_nothing_is_wrapped(tiny_checkpoint: Path) -> None:
    llm = DiffusionLLM.from_pretrained(tiny_checkpoint)
    assert with_adapters(llm, {}) is llm
    request = Request([1])
    assert AdaptedRequest.of(request, None) is request


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "accepted: a folder with adapter_config.json and adapter_model.safetensors"),
        ("{", "adapter_config.json is not JSON"),
        ({"peft_type": "LOHA"}, "got 'LOHA'; accepted: an adapter whose peft_type is LORA"),
        ({"target_modules": "all-linear"}, "got 'all-linear'; accepted: an adapter whose target_modules are a list"),
        ({"target_modules": ["query"]}, "target_modules: unknown value 'query'; accepted: "),
    ],
)
def test_a_folder_that_holds_no_adapter_of_the_model(
    tiny_checkpoint: Path, folders: dict[str, str], tmp_path: Path, change: Any, message: str
) -> None:
    file = tmp_path / "adapter_config.json"
    if isinstance(change, dict):
        told = json.loads((Path(folders["second"]) / "adapter_config.json").read_text())
        file.write_text(json.dumps(told | change))
    elif change is not None:
        file.write_text(change)
    with pytest.raises(InputError) as error:
        check_adapters(str(tiny_checkpoint), {"mine": str(tmp_path)})
    assert str(error.value).startswith("adapters.mine: ") and message in str(error.value)


def test_paths_of_adapters_become_absolute_and_their_ids_are_their_own(
    tiny_checkpoint: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(folders["second"])
    monkeypatch.chdir(folder.parent)
    settings = ReplicaSettings(model=str(tiny_checkpoint), adapters={"mine": folder.name})
    assert settings.checked().adapters == {"mine": str(folder)}
    assert settings.ids == (tiny_checkpoint.name, "mine")
    with pytest.raises(InputError, match="adapters: got 'tiny-random'; accepted: ids that differ from the model's own"):
        ReplicaSettings(model=str(tiny_checkpoint), adapters={"tiny-random": str(folder)}).checked()
