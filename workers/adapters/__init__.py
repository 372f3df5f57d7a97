"""LoRA adapters as experts: folders of PEFT, and the weights that they form over a base."""
