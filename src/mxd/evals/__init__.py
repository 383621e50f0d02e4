"""Measuring students in their host on held-out text, and the report of it."""
