"""Distillation of a faster student from a teacher's trajectories: Ray Train, DeepSpeed and peft."""

import os

import torch

if not torch.cuda.is_available():
    # Read by DeepSpeed when it is imported, which otherwise warns on stdout that it found no accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # oneDNN keeps the kernels that it compiled for the last 1024 shapes, and packed batches differ in theirs: a worker
    # grew to 1.7 GB in 240 steps. They are seldom met again, so that forgetting them costs no time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
