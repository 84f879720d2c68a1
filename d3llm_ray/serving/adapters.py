"""LoRA adapters as models of their own over one base, whose weights are held once.

An engine with adapters has one queue, one KV pool and one set of slots for all of them; only a forward is of one of
them. They take turns, so that none waits for another's answers to end.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from d3llm_ray.decoding import DiffusionLLM, Engine, Event, Request
from d3llm_ray.decoding.request import ActiveRequest
from d3llm_ray.decoding.runners import run
from d3llm_ray.errors import InputError, require, unknown
from d3llm_ray.models import Transformer, read_configs
from d3llm_ray.paths import not_uploaded

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class AdaptedRequest(Request):
    """A request that an adapter of the engine's decodes; None is the base."""

    adapter: str | None = None

    @staticmethod
    def of(request: Request, adapter: str | None) -> Request:
        """The same request of an adapter's."""
        if adapter is None:
            return request
        return AdaptedRequest(**{one.name: getattr(request, one.name) for one in fields(Request)}, adapter=adapter)


def check_adapters(model: str, adapters: Mapping[str, str]) -> None:
    """Raise `InputError` for a folder that holds no LoRA adapter of this model. No weight is read."""
    projections = read_configs(model)[0].projections if adapters else ()
    for name, folder in adapters.items():
        field, path = f"adapters.{name}", Path(folder) / CONFIG
        accepted = f"a folder with {CONFIG} and adapter_model.safetensors{not_uploaded(folder)}"
        require(path.is_file(), field, folder, accepted)
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{field}: {path} is not JSON: {error}") from error
        require(told.get("peft_type") == "LORA", field, told.get("peft_type"), "an adapter whose peft_type is LORA")
        targets = told.get("target_modules")
        require(isinstance(targets, list), field, targets, "an adapter whose target_modules are a list")
        for target in targets:
            if target not in projections:
                raise unknown(f"{field}: target_modules", target, projections)


class Adapters:
    """The adapters of one transformer, of which one is in force, or none."""

    def __init__(self, model: Transformer, folders: Mapping[str, str]) -> None:
        from peft import PeftModel  # slow to import, and a replica without adapters need not wait for it
        from peft.tuners.lora import LoraLayer

        # peft takes the names for attributes of modules: a model's id may have a dot.
        self.names = {name: f"adapter{number}" for number, name in enumerate(folders)}
        wrapped: PeftModel | None = None
        for name, folder in folders.items():
            if wrapped is None:
                options: dict[str, Any] = {"autocast_adapter_dtype": False}
                wrapped = PeftModel.from_pretrained(model, folder, self.names[name], **options)
            else:
                wrapped.load_adapter(folder, self.names[name], autocast_adapter_dtype=False)
        model.eval()
        self._layers = [part for part in model.modules() if isinstance(part, LoraLayer)]
        self._in_force: str | None = next(iter(folders))
        self.use(None)

    def use(self, name: str | None) -> None:
        """Decode with this adapter from now on; None: with the base alone."""
        if name == self._in_force:
            return
        for layer in self._layers:
            layer.enable_adapters(name is not None)
            if name is not None:
                layer.set_adapter(self.names[name], inference_mode=True)
        self._in_force = name


class AdaptedEngine(Engine):
    """An engine whose requests are of several adapters."""

    def __init__(self, adapters: Adapters, *args: Any, **options: Any) -> None:
        # A CUDA graph repeats the kernels of the adapter that it was made with.
        super().__init__(*args, cuda_graphs=False, **options)
        self._adapters = adapters
        self._turns: deque[str | None] = deque([None, *adapters.names])

    def step(self) -> list[Event]:
        """Run one forward of every active request of the adapter whose turn it is."""
        self._admit()
        rows = self._rows
        if not rows:
            return []
        present = {_adapter(row) for row in rows}
        while self._turns[0] not in present:
            self._turns.rotate(-1)
        adapter = self._turns[0]
        self._turns.rotate(-1)
        self._adapters.use(adapter)
        self._rows = [row for row in rows if _adapter(row) == adapter]
        batch = self._plan()
        events = self._update(batch, run(self.runner, batch))
        going = {row.request_id for row in self._rows}
        self._rows = [row for row in rows if _adapter(row) != adapter or row.request_id in going]
        return events


def _adapter(row: ActiveRequest) -> str | None:
    return row.request.adapter if isinstance(row.request, AdaptedRequest) else None


def with_adapters(llm: DiffusionLLM, folders: Mapping[str, str]) -> DiffusionLLM:
    """The same model over an engine that its adapters decode in as well; `llm` itself where there are none."""
    if not folders:
        return llm
    model, family, decoder = llm.model, llm.family, llm.engine.decoder
    sizes = {"max_batch_size": llm.engine.max_batch_size, "vocabulary_size": llm.engine.vocabulary_size}
    del llm.engine  # and its memory: the other one takes what there is
    if model.embed_tokens.weight.is_cuda:
        torch.cuda.empty_cache()
    return DiffusionLLM(
        model, family, llm.tokenizer, AdaptedEngine(Adapters(model, folders), model, family, decoder, **sizes)
    )
