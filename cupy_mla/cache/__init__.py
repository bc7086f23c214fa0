"""Paged caches: appending tokens, and pages of requests."""
