"""A sweep: the cases that a file asks for, each in another process, each result stored before the next case."""
