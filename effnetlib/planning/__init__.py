"""A recipe compiled for a slice that is not there."""
