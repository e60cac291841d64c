"""The network: its hyperparameters, its graph, its sampler, and how files become its parameters."""
