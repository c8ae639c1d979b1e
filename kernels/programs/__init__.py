"""What the backends make of a network's Program, by its steps alone: fused, and at low resolution. Needs no torch."""
