"""Decoding: schedules, selections, caches, presets, the engine and the offline API."""

from d3llm_ray.decoding.api import DiffusionLLM, Output, Prompt, WholePrompt
from d3llm_ray.decoding.engine import Engine
from d3llm_ray.decoding.presets import PRESETS, Decoder, decoder, default_decoder
from d3llm_ray.decoding.request import Completion, Event, Request, Reveal
from d3llm_ray.decoding.settings_file import (
    choose_decoder,
    decoding_settings,
    is_settings_file,
    override_known,
    read_decoder,
    written_settings,
)

__all__ = [
    "PRESETS",
    "Completion",
    "Decoder",
    "DiffusionLLM",
    "Engine",
    "Event",
    "Output",
    "Prompt",
    "Request",
    "Reveal",
    "WholePrompt",
    "choose_decoder",
    "decoder",
    "decoding_settings",
    "default_decoder",
    "is_settings_file",
    "override_known",
    "read_decoder",
    "written_settings",
]
