"""One HTML page about many runs, made from what their folders hold; nothing is run or restored."""
