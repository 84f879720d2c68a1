"""What `pretrain_tiny.py` trains on, with which losses, and the shapes of the embedded models."""
