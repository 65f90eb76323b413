"""LoRA on attention and experts: where it goes, what it covers, how it is stored."""
