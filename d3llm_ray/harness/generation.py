"""What lm-eval asks of a generation, in the words of `DiffusionLLM.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d3llm_ray.errors import require, unknown

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names, first one wins
SAMPLING = ("temperature", "do_sample", "top_p", "top_k")


def generation_options(gen_kwargs: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """`max_tokens`, `stop`, `temperature`, `top_p` and `top_k` of a request's `gen_kwargs`.

    As for lm-eval's `hf`, `do_sample: false` is greedy whatever the temperature, and empty strings of `until` are
    none. `InputError` for a name that is not known here, and for sampling without a temperature.
    """
    for name in gen_kwargs:
        if name not in ("until", *SAMPLING, *LENGTHS):
            raise unknown("gen_kwargs", name, ("until", *SAMPLING, *LENGTHS))
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    until = given.get("until", [])
    until = [until] if isinstance(until, str) else until
    texts = isinstance(until, list | tuple) and all(isinstance(text, str) for text in until)
    require(texts, "gen_kwargs: until", until, "a text or a list of texts")
    sample = given.get("do_sample")
    require(sample in (None, True, False), "gen_kwargs: do_sample", sample, "true or false")
    temperature = given.get("temperature", 0.0)
    if sample is False:
        temperature = 0.0
    require(bool(temperature) or not sample, "gen_kwargs: temperature", temperature, "above 0 with do_sample")
    return {
        "max_tokens": next((given[name] for name in LENGTHS if name in given), max_gen_toks),
        "stop": tuple(text for text in until if text),
        "temperature": temperature,
        "top_p": given.get("top_p", 1.0),
        "top_k": given.get("top_k", 0),
    }
