"""Integer programs of our own objective: whole layers where they are small or linear, neighbourhoods else."""
