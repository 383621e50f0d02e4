"""Other libraries' file formats. Nothing else in mxd knows their names."""
