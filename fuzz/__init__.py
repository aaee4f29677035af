"""Hostile bytes for everything that parses what another process wrote. `python -m fuzz.run --help`."""
