"""A replica's routes in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAI

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.errors import InputError
from d3llm_ray.serving.local import serve_locally
from d3llm_ray.serving.settings import ReplicaSettings


def test_openai_client_gets_the_offline_answer(tiny_checkpoint: Path) -> None:
    (expected,) = DiffusionLLM.from_pretrained(tiny_checkpoint).generate(["3 + 4"], max_tokens=16)
    with serve_locally(ReplicaSettings(model=str(tiny_checkpoint))) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        messages = [{"role": "user", "content": "3 + 4"}]
        answer = client.chat.completions.create(model="tiny-random", messages=messages, max_tokens=16)  # type: ignore[arg-type]
        with client.chat.completions.create(
            model="tiny-random",
            messages=messages,
            max_tokens=16,
            stream=True,  # type: ignore[arg-type]
        ) as stream:
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert answer.choices[0].message.content == streamed == expected.text


def test_bad_settings_are_refused_before_anything_listens() -> None:
    with pytest.raises(InputError, match="decoder"), serve_locally(ReplicaSettings(decoder="nonesuch")):
        pass
