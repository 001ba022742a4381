"""A plan on a model: planner, sharder, initial weights."""
