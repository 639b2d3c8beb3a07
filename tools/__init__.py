"""What only a checkout needs: `make gpu`, the pages that are made of results files, scaling and whole models."""
