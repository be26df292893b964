"""Tests on SmolLM2-135M-Instruct, a pre-trained public model: sums asked live through the proxy at several β.

`make real-model` builds the model and prints the tables; without it, tests of this folder are skipped.
"""
