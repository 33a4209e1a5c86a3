"""Decoding one token without the overhead of modules.

A step of a small model on a CPU takes longer in the Python code of transformers and ``nn.Module`` than in its products.
For the most common families, the same operations are written here as plain functions of tensors. Everything else
(training, prompts, other families, GPUs) runs through transformers.
"""
