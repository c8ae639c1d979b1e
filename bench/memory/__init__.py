"""Memory by arithmetic: live bytes from a tape of the step, and what a GPU's allocator makes of them. No torch."""
