"""What `vllm-compat gpu-reference` runs: models made on the spot, the list of steps, and the loop that goes through them."""
