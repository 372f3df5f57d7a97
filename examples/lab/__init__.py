"""A small laboratory of real multimodal experts tuned from one small base language model."""
