"""Vanilla selection: a fixed number of positions a forward, ranked as LLaDA's or Dream's samplers rank them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from d3llm_ray.decoding.canvas import BoolArray, Canvas
from d3llm_ray.decoding.contracts import Opening, Selected
from d3llm_ray.decoding.rules import FamilyRules
from d3llm_ray.decoding.sampling import uniforms
from d3llm_ray.decoding.statistics import TokenStatistics
from d3llm_ray.errors import require, unknown

Remasking = Literal["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]
DREAM_RULES = ("origin", "maskgit_plus", "topk_margin", "entropy")


@dataclass(frozen=True)
class TopK:
    """`steps` forwards for the whole canvas (None: as many as positions), shared out over the blocks by length.

    `remasking` None takes the family's: LLaDA "low_confidence", Dream "entropy".
    "low_confidence", "random" (LLaDA generate.py): a block of m masks that has S forwards reveals m // S positions
    in each, and one more in the first m % S; the most probable ones, or random ones.
    "origin", "maskgit_plus", "topk_margin", "entropy" (Dream's diffusion_generate): time runs from 1 to `eps` in
    equal steps; a step from t to s reveals a share 1 - s / t of the masks, the last one all that are left: each at
    random, or those of the highest probability, gap between the two best, or negative entropy of the tempered and
    filtered distribution; with `alg_temp`, drawn by softmax(score / alg_temp) without replacement. A step that
    would reveal nothing runs no forward.
    `cfg_scale`: classifier-free guidance by a second sequence whose prompt is masked (LLaDA generate.py).
    `defer_stops`: positions whose token is a stop token are revealed only when nothing else is left to reveal
    (LLaDA's `confidence_eos_eot_inf`, with which its GSM8K and MATH figures were made).
    """

    steps: int | None = None
    remasking: Remasking | None = None
    cfg_scale: float = 0.0
    alg_temp: float = 0.0
    eps: float = 1e-3
    defer_stops: bool = False

    def __post_init__(self) -> None:
        steps = self.steps
        whole = isinstance(steps, int) and not isinstance(steps, bool) and steps > 0
        require(steps is None or whole, "steps", steps, "a positive whole number or null")
        if self.remasking is not None and self.remasking not in get_args(Remasking):
            raise unknown("remasking", self.remasking, get_args(Remasking))
        for field in ("cfg_scale", "alg_temp"):
            value = getattr(self, field)
            require(0.0 <= value < math.inf, field, value, "a number, 0 or more")
        require(isinstance(self.defer_stops, bool), "defer_stops", self.defer_stops, "true or false")
        require(0.0 < self.eps < 1.0, "eps", self.eps, "a number between 0 and 1")

    @property
    def needs_margins(self) -> bool:
        return self.remasking == "topk_margin"

    def rule(self, rules: FamilyRules) -> Remasking:
        """The remasking in force for a family."""
        return self.remasking or rules.remasking

    def select(
        self, canvas: Canvas, opening: Opening, statistics: TokenStatistics, rules: FamilyRules, seed: int
    ) -> Selected:
        block, rule = canvas.first_open_block(), self.rule(rules)
        start, end = canvas.starts[block], canvas.ends[block]
        total = min(self.steps or canvas.size, canvas.size)
        done = total * start // canvas.size
        steps = max(1, total * end // canvas.size - done)
        if rule == "origin":
            revealed = self._origin(canvas, opening, block, steps, done, seed)
        else:
            step = canvas.steps_in_block[block]
            quota = (end - start) // steps + (step < (end - start) % steps)
            if rule in DREAM_RULES:
                quota = 0
                while quota == 0:
                    quota = self._timestep_quota(len(opening.eligible), step, steps)
                    step += 1
                canvas.steps_in_block[block] = step
            else:
                canvas.steps_in_block[block] += 1
            scores = self._scores(rule, canvas, opening, statistics, seed)
            if self.defer_stops:
                scores = np.where(np.isin(statistics.sampled, list(canvas.stop_ids)), -np.inf, scores)
            revealed = np.zeros(len(opening.eligible), dtype=np.bool_)
            revealed[np.argsort(-scores, kind="stable")[: max(1, quota)]] = True  # ties: the lowest position
        return Selected(revealed)

    def _share(self, step: int, steps: int) -> float:
        """Share of the masks that Dream's step reveals: 1 - s / t."""
        times = np.linspace(1.0, self.eps, steps + 1)
        return 1.0 if step >= steps - 1 else float(1.0 - times[step + 1] / times[step])

    def _timestep_quota(self, masks: int, step: int, steps: int) -> int:
        return masks if step >= steps - 1 else int(masks * self._share(step, steps))

    def _origin(self, canvas: Canvas, opening: Opening, block: int, steps: int, done: int, seed: int) -> BoolArray:
        """Each mask on its own, with the step's share as its probability; goes on to the first step with a hit."""
        revealed = np.zeros(len(opening.eligible), dtype=np.bool_)
        while not revealed.any():
            step = canvas.steps_in_block[block]
            canvas.steps_in_block[block] += 1
            drawn = uniforms(seed, opening.eligible, done + step + 1)
            revealed = drawn < self._share(step, steps)
        return revealed

    def _scores(
        self, rule: Remasking, canvas: Canvas, opening: Opening, statistics: TokenStatistics, seed: int
    ) -> np.ndarray:
        """What positions are ranked by, higher first."""
        if rule == "low_confidence":
            return statistics.logprob
        drawn = uniforms(seed, opening.eligible, canvas.forwards)
        if rule == "random":
            return drawn
        scores = {
            "maskgit_plus": statistics.filtered_confidence,
            "topk_margin": statistics.margin,
            "entropy": -statistics.filtered_entropy,
        }[rule]
        if self.alg_temp > 0:  # Gumbel top-k draws without replacement (Kool et al., arXiv:1903.06059)
            return scores / self.alg_temp - np.log(-np.log(drawn))
        return scores
