"""`ossia board`: a local page over all runs under a folder, made of their `metrics.jsonl` and `config.yaml` alone."""
