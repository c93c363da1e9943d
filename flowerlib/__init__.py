"""Flower: flow-guided fine-tuning of LLM recommenders (Gao et al., SIGIR 2025), small enough to read."""
