"""What runs: a case in a process of its own, built once and handed to each metric."""
