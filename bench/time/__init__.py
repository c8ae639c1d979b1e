"""Time by arithmetic: every pass over memory, and the least that a device needs for them. No torch."""
