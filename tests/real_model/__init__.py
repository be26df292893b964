"""SmolLM2-135M-Instruct, a pre-trained model nobody here trained: sums asked live through the proxy at several β.

`make real-model` builds the model and prints the tables; tests of this folder are skipped where it is not built.
"""
