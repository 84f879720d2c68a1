"""Literal, slow decoders for one sequence at temperature 0: oracles that share no code with `d3llm_ray.decoding`."""
