"""What is stored: headers, entries, the manifest, its tensor table, references."""
