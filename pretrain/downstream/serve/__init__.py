"""Embeddings over HTTP: `python -m pretrain.downstream.serve BACKBONE`."""
