"""The network: hyperparameters, graph, sampler, logits processors, and the loading of weights."""
