"""Models that run without Ossia."""
