"""Distillation of a faster student from a teacher's trajectories: Ray Train, DeepSpeed and peft."""

import os

import torch

if not torch.cuda.is_available():
    # Read by DeepSpeed when it is imported, which otherwise warns on stdout that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
