"""Settings of the verbs that talk to a server: a running one behind a URL, or a model served in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from d3llm_ray.config import Settings
from d3llm_ray.serving.settings import ModelSettings


class KeyOptions(Settings):
    """What a verb that may ask a server is told of its key."""

    api_key_file: Path | None = Field(
        None,
        description="file with the server's API key; null: that of D3LLM_RAY_API_KEY or OPENAI_API_KEY, if set",
    )


class RequestOptions(KeyOptions):
    """How often and how long a verb asks for one answer, and with which key."""

    retries: int = Field(
        8,
        ge=0,
        description="times that a request is sent again which `url` has no room for, fails at or does not answer",
    )
    timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False, description="seconds that one answer may take")


class ClientSettings(KeyOptions, ModelSettings):
    """Where answers come from: a server, or a model in this process."""

    url: str | None = Field(
        None, description="server to ask, such as http://127.0.0.1:8000; null: `model`, served in this process"
    )

    def of_model(self) -> dict[str, Any]:
        """The settings of a model in this process, which say nothing where there is a `url`."""
        return {name: getattr(self, name) for name in OF_MODEL}


OF_MODEL = tuple(ModelSettings.model_fields)


class BatchSettings(RequestOptions, ClientSettings):
    """Answer a file of requests in OpenAI's batch format: `d3llm-ray batch IN.jsonl OUT.jsonl`."""

    verb: ClassVar[str] = "batch"
    positional: ClassVar[tuple[str, ...]] = ("input", "output")

    input: Path = Field(description=".jsonl file of requests: custom_id, method, url and body in each line")
    output: Path = Field(Path("runs/batch.jsonl"), description=".jsonl file for the answers, in the order of `input`")
    concurrency: int | None = Field(
        None, gt=0, description="requests that are under way at once; null: twice max_batch_size"
    )


def on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


class ChatSettings(ClientSettings):
    """Talk to a model in the terminal and watch its canvas fill; without a terminal, a line of stdin is a message."""

    verb: ClassVar[str] = "chat"

    served_model_name: str | None = Field(
        None,
        min_length=1,
        description="model id that requests name; default: the zoo name or the folder's name, of a `url` its first",
    )
    system: str | None = Field(None, description="system message before the conversation")
    temperature: float = Field(0.0, ge=0.0, le=2.0, description="0 decodes greedily")
    watch: bool = Field(default_factory=on_terminal, description="show the canvas while it fills; on a terminal only")
    color: Literal["entropy", "forward"] = Field("entropy", description="what the colour of a revealed position tells")
