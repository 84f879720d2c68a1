"""Training: engines, checkpoints, the loop, one worker's work, validation and trackers."""
