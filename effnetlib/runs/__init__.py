"""One run, on disk and on several hosts."""
