"""Examples: where they come from, what is done to them, in what order they reach a strategy."""
