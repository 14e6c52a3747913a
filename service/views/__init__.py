"""What the dashboard shows of stored things: figures and grids. Needs numpy and plotly."""
