"""Weights under the names of timm and Keras: import, export, evaluation."""
