"""Running models: their placements over time, drift, and refreshing by policy."""
