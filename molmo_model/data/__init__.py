"""Datasets, shards, mixtures, the order of data and the loader."""
