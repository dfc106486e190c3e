"""Knows: models, clusters, heuristics and sweeps as YAML, and the one loader that reads them."""
