"""Sweeps, the files beside this one, and what runs them.

Of the cases that a file asks for each runs in another process, and each result is stored before the next case starts.
"""
