"""What predictions are worth: fitted to measured rows, and held against what cards reported."""
