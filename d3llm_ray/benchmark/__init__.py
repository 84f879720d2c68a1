"""Decoding speed of a model, a checkpoint or a shape, next to what the machine allows; needs no Ray and no pydantic."""
