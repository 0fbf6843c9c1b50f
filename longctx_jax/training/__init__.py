"""Training: state, optimizer, steps, checkpoints, metrics, sweeps and the loop."""
