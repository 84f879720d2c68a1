"""A trained model that learns more words."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedTokenizerBase

from d3llm_ray.models import Transformer

STD = 0.02  # of the vectors of words that are new


def with_vocabulary(model: Transformer, have: PreTrainedTokenizerBase, want: PreTrainedTokenizerBase) -> Transformer:
    """`model`, of the vocabulary `have`, with that of `want`: a word of both keeps its vectors, others begin small."""
    old, new = have.get_vocab(), want.get_vocab()
    if old == new:
        return model
    size = len(want)
    extended = Transformer(dataclasses.replace(model.config, vocab_size=size)).to(model.embed_tokens.weight)
    shared = sorted(old.keys() & new.keys())
    sources, targets = torch.tensor([old[word] for word in shared]), torch.tensor([new[word] for word in shared])
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.startswith(("embed_tokens.", "lm_head.")):
            weights[name] = (STD * torch.randn(size, tensor.shape[1])).to(tensor)
            weights[name][targets] = tensor[sources]
    extended.load_state_dict(weights)
    return extended
