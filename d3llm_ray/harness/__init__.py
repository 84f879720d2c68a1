"""EleutherAI's lm-eval, as it is, on this project's decoders."""
