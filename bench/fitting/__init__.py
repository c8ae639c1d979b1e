"""The largest networks within limits: the question, the lattice of candidates, the search, the answer."""
