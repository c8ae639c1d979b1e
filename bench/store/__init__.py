"""Results in one SQLite file, the tables that are read from it, and the scores that users bring."""
