"""``make zoo``: models of transformers, timm, torchvision and torch.nn, tiny and random, adapted and compared.

Each library's models stand in a table of its own (``of_*.py``); ``checks.py`` says what is asked of a model;
``python -m tools.zoo`` runs it and writes the page.
"""
