"""The fused operators: launch, checks, autograd and FLOP formula of each."""
