"""Judging: scores of one model, and paired comparison of two on the same records."""
