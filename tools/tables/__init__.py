"""The tables and plots of README and docs, made from results files: `make report` (``publish.py``) writes them."""
