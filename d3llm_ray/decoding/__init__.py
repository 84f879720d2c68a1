"""Decoding: schedules, selections, caches, presets, the engine and the offline API."""

from d3llm_ray.decoding.api import DiffusionLLM, Output
from d3llm_ray.decoding.engine import Completion, Engine, Event, Request
from d3llm_ray.decoding.presets import PRESETS, Decoder, decoder

__all__ = ["PRESETS", "Completion", "Decoder", "DiffusionLLM", "Engine", "Event", "Output", "Request", "decoder"]
