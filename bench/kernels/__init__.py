"""`skipcost kernels`: the calls of networks checked, timed and explained; needs torch, triton and numpy alone."""
