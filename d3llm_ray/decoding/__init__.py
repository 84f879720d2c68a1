"""Decoding: schedules, selections, caches, presets, the engine and the offline API."""

from d3llm_ray.decoding.api import DiffusionLLM, Output
from d3llm_ray.decoding.engine import Engine
from d3llm_ray.decoding.presets import PRESETS, Decoder, decoder
from d3llm_ray.decoding.request import Completion, Event, Request, Reveal

__all__ = [
    "PRESETS",
    "Completion",
    "Decoder",
    "DiffusionLLM",
    "Engine",
    "Event",
    "Output",
    "Request",
    "Reveal",
    "decoder",
]
