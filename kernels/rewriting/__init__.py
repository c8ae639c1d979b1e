"""Networks and users' modules on other operators: fused, and at low resolution."""
