UPDATE cloob_vectors SET vector = x'00';
