"""Tables and pictures of the pages, from the records in ``results/``."""
