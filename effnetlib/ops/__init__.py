"""Layers in the form that suits each platform."""
