"""Whether kernels are right: exact oracles, canaries around buffers, ahead-of-time compilation, resources."""
