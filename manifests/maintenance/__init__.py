"""Operations on a whole store: verify, garbage collection, copy, push, leases."""
