"""Detectors, each in one file."""
