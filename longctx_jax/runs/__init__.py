"""From a config, or from the folder of a run, to the objects that train, evaluate and sample."""
