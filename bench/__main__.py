"""`python -m skipcost.bench`: the same as `skipcost`."""

from skipcost.bench.cli import main

main()
