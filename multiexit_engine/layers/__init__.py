"""Building blocks of the models: modules that call ops."""
