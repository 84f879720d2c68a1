"""Teacher trajectories: prompts in, one Parquet row for each with the order in which its tokens were revealed."""

from d3llm_ray.trajectories.schema import SCHEMA, read_metadata, read_trajectories

__all__ = ["SCHEMA", "read_metadata", "read_trajectories"]
