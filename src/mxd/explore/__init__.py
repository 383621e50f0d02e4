"""See what the units of a run do: collect evidence, keep it in SQLite, serve it as a page, export it."""
