"""What is done to a store: verify, garbage collection, copy, push, leases."""
