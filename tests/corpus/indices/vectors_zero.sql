UPDATE cloob_vectors SET vector = zeroblob(length(vector));
