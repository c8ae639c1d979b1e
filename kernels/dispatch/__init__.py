"""Which implementation runs a call: by measured rows, else by break-even. Needs no torch."""
