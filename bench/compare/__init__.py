"""Two sides of a change: exact numbers by `gate`, latency in turns by `ab`, and the verdicts of both."""
