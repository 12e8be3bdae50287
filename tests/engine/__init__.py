"""vLLM itself, on the CPU, with tiny hosts: `make test-vllm` makes its environment and runs these."""
