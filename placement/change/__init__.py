"""Change over time: the best placement within few moves, what each move buys, whether to move at all."""
