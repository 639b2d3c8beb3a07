"""What runs on the GPU. Each module says what its launches compute; ``prepare.py`` makes them."""
