"""How many replicas a model needs, from what its replicas decode and what waits in them.

Ray Serve counts requests. A diffusion replica is short of slots, and a request is as long as its canvas: sixteen
requests of 32 tokens are less work than four of 1,024. Therefore each replica reports a `Load`, and the policy
`autoscaling_config.policy` of a YAML file weighs it:

    policy:
      policy_function: d3llm_ray.serving.autoscaling:CanvasDemand
      policy_kwargs: {active_share: 0.75, queued_tokens: 1024}

Serve's controller runs the policy: nothing here may import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from d3llm_ray.errors import require

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_DECIMALS = 6  # Serve rounds up: a mean of floats must not make a replica of its last digit


@dataclass(frozen=True)
class Load:
    """What one replica has to do. Over a look-back period these are means."""

    active: float  # sequences that are decoded now
    queued_tokens: float  # canvas tokens of the requests that wait for a slot
    slots: float  # sequences that it decodes at most

    def figures(self) -> dict[str, float]:
        """As a replica's `record_autoscaling_stats` returns it."""
        return {name: float(value) for name, value in asdict(self).items()}


def loads(metrics: Mapping[str, Mapping[Any, float]] | None) -> list[Load]:
    """The replicas' loads from Serve's `{name: {replica: value}}`, without those that have not reported all of it."""
    columns = [(metrics or {}).get(name, {}) for name in Load.__dataclass_fields__]
    reported = [replica for replica in columns[0] if all(replica in column for column in columns)]
    return [Load(*(column[replica] for column in columns)) for replica in reported]


def replicas_needed(loads: Iterable[Load], active_share: float, queued_tokens: float) -> float:
    """Replicas whose slots are taken to `active_share`, and one more for each `queued_tokens` canvas tokens that wait.

    sum(active) / (active_share * mean(slots)) + sum(queued_tokens) / queued_tokens; 0 without replicas.
    """
    loads = list(loads)
    if not loads:
        return 0.0
    slots = sum(load.slots for load in loads) / len(loads)
    taken = sum(load.active for load in loads) / (active_share * slots)
    waiting = sum(load.queued_tokens for load in loads) / queued_tokens
    return round(taken + waiting, _DECIMALS)


class CanvasDemand:
    """A policy for Ray Serve's `AutoscalingPolicy`.

    `active_share`: share of its slots that a replica should have taken, 0 to 1. `queued_tokens`: canvas tokens in the
    queues that are worth another replica. Serve applies the delays, the factors and the bounds of `autoscaling_config`
    to what comes out. While no replica has reported, `target_ongoing_requests` decides as in Serve's own policy.
    """

    def __init__(self, active_share: float = 0.75, queued_tokens: float = 1024.0) -> None:
        require(0 < active_share <= 1, "active_share", active_share, "a number above 0, at most 1")
        require(queued_tokens > 0, "queued_tokens", queued_tokens, "a positive number of tokens")
        self._active_share, self._queued_tokens = active_share, queued_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """(replicas wanted, no state)."""
        if context.current_num_replicas == 0:
            return context.target_num_replicas, {}  # they are on their way; from zero Serve starts one by itself
        reported = loads(context.aggregated_metrics)
        requests = context.total_num_requests
        if not reported:
            assert context.config is not None
            return requests / context.config.get_target_ongoing_requests(), {}
        needed = replicas_needed(reported, self._active_share, self._queued_tokens)
        # A request that is tokenised, or whose answer is read slowly, has no slot: it still needs its replica.
        return max(needed, 1.0 if requests > 0 else 0.0), {}
