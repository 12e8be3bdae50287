"""Test vLLM itself on the CPU, with tiny hosts. `make test-vllm` builds its environment and runs these tests."""
