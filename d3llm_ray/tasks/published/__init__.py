"""The field's benchmarks: their data, prompts and answers as published."""
