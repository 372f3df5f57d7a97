"""A build read back: bytes, bit masks, reconstructed weights."""
