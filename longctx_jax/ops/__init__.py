"""Pure functions on arrays: the mathematics, with no parameters and no config."""
