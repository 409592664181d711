"""From records to tables, verdicts and HTML."""
