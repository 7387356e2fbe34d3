"""Where images come from: a folder, tables of them or tar shards, here or behind an address."""
