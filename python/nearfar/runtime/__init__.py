"""What all operators share, and nothing that belongs to one of them."""
