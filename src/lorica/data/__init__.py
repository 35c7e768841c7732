"""Read, template, encode and pack data. Rows are plain dicts and lists here; no torch."""
