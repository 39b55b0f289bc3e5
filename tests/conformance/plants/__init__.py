"""How each seeded fault is put into the library, by rooms: noise, sampling, accounting, clipping."""
