"""Log-likelihoods of given answers: an estimated bound for masked-diffusion models, exact for causal ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from d3llm_ray.decoding import DiffusionLLM
from d3llm_ray.decoding.rules import family_rules
from d3llm_ray.decoding.statistics import MAX_CHUNK_ELEMENTS, token_statistics
from d3llm_ray.errors import DecodingError, InputError, require
from d3llm_ray.harness.masks import IntArray, maskings
from d3llm_ray.models import BlockCausal, Ragged


@dataclass(frozen=True)
class ScoredText:
    """Token ids of which `target` is scored, given `context`; both have one or more."""

    context: Sequence[int]
    target: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.target)


class Likelihood(NamedTuple):
    """In nats; and whether greedy decoding of as many tokens gives just these."""

    logprob: float
    greedy: bool


class _Sequence(NamedTuple):
    """A row of a forward: token ids, and the positions whose tokens are predicted."""

    ids: IntArray
    predicted: IntArray


class LikelihoodScorer:
    """Scores texts with the model of `llm`, `batch_size` sequences a forward.

    A masked-diffusion model is scored by `samples` maskings of the target (`masks.maskings`): an estimate of a lower
    bound of the log-likelihood, over all tokens but the mask. It is the same in every batch, since what is masked
    depends on `seed` and the text alone. A causal model is scored exactly, by one forward.
    """

    def __init__(self, llm: DiffusionLLM, batch_size: int = 32, samples: int = 128, seed: int = 0) -> None:
        self._llm, self._batch_size, self._samples, self._seed = llm, batch_size, samples, seed
        self._model, self._mask = llm.model, llm.family.mask_token_id
        self._context = llm.model.config.max_position_embeddings

    @property
    def most_tokens(self) -> int:
        """The longest text: a causal model does not read the last token."""
        return self._context + (self._mask is None)

    def score(self, texts: Sequence[ScoredText]) -> Iterator[tuple[int, Likelihood]]:
        """Yield the index of each text with its likelihood, longest texts first.

        Raises:
            InputError: a text without context or target, too long, or with the mask token; block-causal attention.
            DecodingError: logits that are not finite.
        """
        attention = self._llm.family.layout.attention
        if attention == "block-causal":
            accepted = "models with full or causal attention"
            raise InputError(f"loglikelihood: the model has {attention} attention; accepted: {accepted}")
        for number, text in enumerate(texts):
            self._check(text, f"texts[{number}]")
        order = sorted(range(len(texts)), key=lambda number: -texts[number].length)
        for begin in range(0, len(order), self._batch_size):
            numbers = order[begin : begin + self._batch_size]
            chunk = [texts[number] for number in numbers]
            found = self._exact(chunk) if self._mask is None else self._estimated(chunk)
            for number, likelihood in zip(numbers, found, strict=True):
                if not np.isfinite(likelihood.logprob):
                    raise DecodingError(f"texts[{number}]: the model's logits are NaN or infinite")
                yield number, likelihood

    def _check(self, text: ScoredText, name: str) -> None:
        require(bool(text.context), f"{name}: context", "no tokens", "one token or more")
        require(bool(text.target), f"{name}: target", "no tokens", "one token or more")
        longest = f"at most {self.most_tokens}, the model's context"
        require(text.length <= self.most_tokens, name, f"{text.length} tokens", longest)
        masks = self._mask in text.context or self._mask in text.target
        require(not masks, name, f"the mask token {self._mask}", "ids of a text, without the mask's")

    def _exact(self, texts: Sequence[ScoredText]) -> list[Likelihood]:
        """Teacher forcing: every target token given all before it."""
        rows = []
        for text in texts:
            ids = np.array([*text.context, *text.target])
            rows.append(_Sequence(ids, np.arange(len(text.context), ids.size)))
        logprobs, likeliest = self._logprobs(rows)
        ends = np.cumsum([len(text.target) for text in texts])
        return [
            Likelihood(float(part.sum()), bool(best.all()))
            for part, best in zip(np.split(logprobs, ends[:-1]), np.split(likeliest, ends[:-1]), strict=True)
        ]

    def _estimated(self, texts: Sequence[ScoredText]) -> list[Likelihood]:
        totals = np.zeros(len(texts))
        jobs = ((number, row, weight) for number, text in enumerate(texts) for row, weight in self._masked(text))
        while batch := list(islice(jobs, self._batch_size)):
            logprobs, _ = self._logprobs([row for _, row, _ in batch])
            weights = np.repeat([weight for _, _, weight in batch], [row.predicted.size for _, row, _ in batch])
            owners = np.repeat([number for number, _, _ in batch], [row.predicted.size for _, row, _ in batch])
            np.add.at(totals, owners, weights * logprobs)
        return [Likelihood(float(total), flag) for total, flag in zip(totals, self._greedy(texts), strict=True)]

    def _masked(self, text: ScoredText) -> Iterator[tuple[_Sequence, float]]:
        ids, first = np.array([*text.context, *text.target]), len(text.context)
        generator = np.random.default_rng([self._seed, *ids.tolist()])
        for masked, weight in zip(*maskings(len(text.target), self._samples, generator), strict=True):
            yield _Sequence(ids, first + np.flatnonzero(masked)), float(weight)

    @torch.inference_mode()
    def _greedy(self, texts: Sequence[ScoredText]) -> list[bool]:
        """Whether the model fills in each target itself, one token a forward, the one it is surest of first."""
        by_entropy = family_rules(self._llm.family).remasking == "entropy"
        left = [np.arange(len(text.context), text.length) for text in texts]  # positions still masked
        filled = [False] * len(texts)
        pending = list(range(len(texts)))
        while pending:
            rows = [_Sequence(np.array([*texts[n].context, *texts[n].target]), left[n]) for n in pending]
            statistics = token_statistics(
                self._model,
                self._hidden(rows),
                vocabulary=self._llm.engine.vocabulary_size,
                mask_id=self._mask,
                sampling=None,
            )
            sureness = -statistics.entropy if by_entropy else statistics.confidence
            end, going_on = 0, []
            for number, row in zip(pending, rows, strict=True):
                begin, end = end, end + row.predicted.size
                best = int(sureness[begin:end].argmax())
                if statistics.argmax[begin + best] == row.ids[row.predicted[best]]:
                    left[number] = np.delete(left[number], best)
                    filled[number] = not left[number].size
                    going_on += [number] if left[number].size else []
            pending = going_on
        return filled

    @torch.inference_mode()
    def _logprobs(self, rows: Sequence[_Sequence]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log probability of each predicted token, row after row, and whether no token is likelier."""
        hidden = self._hidden(rows)
        tokens = np.concatenate([row.ids[row.predicted] for row in rows])
        targets = torch.from_numpy(tokens).to(hidden.device)
        step = max(1, MAX_CHUNK_ELEMENTS // self._model.config.vocab_size)
        logprobs, likeliest = [], []
        for begin in range(0, hidden.shape[0], step):
            logits = self._model.logits(hidden[begin : begin + step]).float()  # [rows, vocab_size]
            if self._mask is not None:
                logits[:, self._mask] = -torch.inf  # never predicted
            wanted = targets[begin : begin + step]
            logprobs.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0])
            likeliest.append(logits[:, : self._llm.engine.vocabulary_size].argmax(dim=-1) == wanted)
        return torch.cat(logprobs).double().cpu().numpy(), torch.cat(likeliest).cpu().numpy()

    @torch.inference_mode()
    def _hidden(self, rows: Sequence[_Sequence]) -> torch.Tensor:
        """Final hidden states that predict the rows' predicted positions, which a diffusion model sees masked."""
        inputs = []
        for row in rows:
            ids = row.ids[:-1] if self._mask is None else row.ids.copy()
            if self._mask is not None:
                ids[row.predicted] = self._mask
            inputs.append(ids)
        lengths = [ids.size for ids in inputs]
        starts = np.cumsum(lengths) - lengths
        shift = int(self._llm.family.logit_shift)  # the row before a position predicts it
        read = np.concatenate([start + row.predicted - shift for start, row in zip(starts, rows, strict=True)])
        device = self._model.embed_tokens.weight.device
        ragged = Ragged.build(lengths, pattern=BlockCausal(1) if self._mask is None else None, device=device)
        packed = torch.from_numpy(np.concatenate(inputs)).to(device)
        hidden: torch.Tensor = self._model(packed, ragged, rows=torch.from_numpy(read).to(device))
        return hidden
