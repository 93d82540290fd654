"""Flax NNX modules around the ops: projections, mixers, blocks and a decoder."""
