"""Federated LoRA aggregation: adapter spec and codec, rules, server optimisers. Knows no transport and no Flower."""
