"""Distillation of a faster student from a teacher's trajectories: Ray Train, DeepSpeed and peft."""
