"""The HTML report of a store. Reads the store and graphs alone; never imports torch."""
