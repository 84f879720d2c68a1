"""Arithmetic of an optimizer step: forward, backward, and what activation checkpointing computes again."""

from __future__ import annotations

from dataclasses import dataclass

from d3llm_ray.models import ModelConfig, Work


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a step. `recomputed` ones repeat some of the forward's."""

    forward: int
    backward: int
    recomputed: int

    @property
    def model(self) -> int:
        """What any implementation has to compute: the numerator of MFU (arXiv:2204.02311, appendix B)."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """What is computed with activation checkpointing: the numerator of HFU."""
        return self.model + self.recomputed


def step_flops(
    config: ModelConfig, work: Work, *, adapters: int, checkpointing: bool, recomputed_head: bool
) -> StepFlops:
    """Operations of one forward and backward over `work`; the optimizer's, a few for each weight, are left out.

    With T tokens, P weights of the layers' matrices, A those of the adapters on them (`adapters`; 0 where the weights
    themselves are trained), H of the LM head, N scored rows, and q = 4 x layers x hidden size x query-key pairs:

        forward     2 P T + 2 A T + 2 H N + q
        backward    as much for the gradients of the inputs; as much again for those of what is trained (2 A T, or
                    2 P T + 2 H N); and q again, for attention has four products in it and two in the forward
        recomputed  2 P T + 2 A T + q with activation checkpointing, and 2 H N where the LM head runs in chunks

    The gradient of the first layer's input counts although nothing needs it: a hundredth at 32 layers.
    """
    attention, matrices = config.attention_flops(work), config.matrix_flops(work)
    adapted = 2 * adapters * work.tokens
    head = config.head_flops(work)
    forward = matrices + adapted + head + attention
    of_trained = adapted if adapters else matrices + head
    layers = matrices + adapted + attention
    return StepFlops(
        forward=forward,
        backward=forward + of_trained + attention,
        recomputed=checkpointing * layers + recomputed_head * head,
    )
