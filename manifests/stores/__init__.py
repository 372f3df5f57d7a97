"""Where bytes are stored: local folders, object stores, the Hub."""
