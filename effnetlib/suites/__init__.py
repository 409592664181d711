"""Suites of notebooks: their files, their parameters, and how papermill runs them."""
