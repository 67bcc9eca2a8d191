"""What can be removed from a network and what is kept, as frozen data. Imports: no other room."""
