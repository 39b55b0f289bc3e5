"""What a machine would allow: operations and bytes of the best plan of each model."""
