"""The whole pipeline on one machine, from a teacher to a served student."""
