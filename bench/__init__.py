"""Measuring: sweeps, the store, and the command line. `bench.cli` is the entry; nothing here needs torch on import."""
