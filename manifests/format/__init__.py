"""The stored records: headers, entries, the manifest, its tensor table, references."""
