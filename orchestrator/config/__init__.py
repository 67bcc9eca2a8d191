"""What a user may ask for, typed and frozen, and how YAML becomes it. Imports: no other room, no torch, no Ray."""
