"""An OpenAI-compatible server on one engine."""
