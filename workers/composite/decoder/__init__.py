"""What experts' classes hand their decoders, carried over to the base's decoder."""
