"""Imports, exports and evaluates weights with the names of timm and Keras."""
