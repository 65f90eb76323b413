"""Models: gpt-oss on MXFP4-resident experts, and any other causal language model as transformers has it."""
