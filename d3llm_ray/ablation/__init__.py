"""Which parts of the recipe matter: distillations with and without each, several seeds, on Ray Tune."""
