"""The commands of `skipcost`, a file each: options in, tables and files out."""
