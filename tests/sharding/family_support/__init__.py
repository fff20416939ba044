"""Tiny models of every family, and other people's ways to load them."""
