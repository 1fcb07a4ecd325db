UPDATE cloob_vectors SET vector = zeroblob(4004);
