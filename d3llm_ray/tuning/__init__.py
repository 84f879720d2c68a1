"""Search of decoding settings with Ray Tune: a search space in, a decoding settings file out."""
