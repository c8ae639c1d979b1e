"""Convolutions over up-sampled maps at low resolution, exactly, borders included; their costs by counting."""
