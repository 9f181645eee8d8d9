"""Containers into the formats of other tools."""
