UPDATE cloob_vectors SET row = -1;
