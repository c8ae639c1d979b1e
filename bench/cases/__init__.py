"""A case: one network or model of a user under one setting, by name, and what of it can change a number."""
