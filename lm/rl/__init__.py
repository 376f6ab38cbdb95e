"""Reinforcement learning with credit read off the attention of the policy (arXiv 2510.13554)."""
