"""Compiles a recipe for a slice that is not there."""
