"""Makes tables, verdicts and HTML from records."""
